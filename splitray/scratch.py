"""Folders that live as long as a block, and are gone however the program ends, a second Ctrl-C included."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitray.errors import StartFailed

PREFIX = "splitray-"
_LONGEST_ROOT = 24
_RAY_BYTES = 20_000_000  # of logs and session files; a Ray without them is waited for in vain
_living: set[str] = set()


@contextmanager
def scratch_folder(*, for_ray: bool = False) -> Iterator[Path]:
    """A new folder for temporary files; for Ray one with room, and a short path, as its sockets' must be.

    Raises:
        StartFailed: there is no room for it, or nowhere to write.
    """
    try:
        root = "/tmp" if for_ray and len(tempfile.gettempdir()) > _LONGEST_ROOT else tempfile.gettempdir()
        if for_ray and (free := shutil.disk_usage(root).free) < _RAY_BYTES:
            raise OSError(f"{root} has {free / 1e6:.1f} MB left, and Ray writes {_RAY_BYTES / 1e6:.0f} MB")
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=root)
    except OSError as error:
        remedy = "make room there, or name another folder in TMPDIR"
        raise StartFailed(f"no temporary folder can be made: {error}; {remedy}") from error
    _living.add(folder)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _living.discard(folder)


def remove_all() -> None:
    """What is left when there is no time for anything else."""
    for folder in tuple(_living):
        shutil.rmtree(folder, ignore_errors=True)
