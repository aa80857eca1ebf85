"""Folders that live as long as a block, and are gone however the program ends, a second Ctrl-C included."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitray.errors import StartFailed

PREFIX = "splitray-"
_LONGEST_ROOT = 24
_living: set[str] = set()


@contextmanager
def scratch_folder(*, for_sockets: bool = False) -> Iterator[Path]:
    """A new folder for temporary files, or with a short path for sockets, which must stay under 108 characters.

    Raises:
        StartFailed: there is no room for it, or nowhere to write.
    """
    try:
        short = for_sockets and len(tempfile.gettempdir()) > _LONGEST_ROOT
        folder = tempfile.mkdtemp(prefix=PREFIX, dir="/tmp" if short else None)
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
