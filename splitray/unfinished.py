"""What a long run has done so far, kept in its folder until the results are there: a run that was killed goes on.

Each cell of the run is one pickle, written as soon as it is known; what is torn at the end was not done.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from splitray.errors import unwritable
from splitray.own_code import code_hash

Found = TypeVar("Found")


class Unfinished:
    """The cells of a run that are done, by name."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        """Read what the file holds, if this code has written it; without a file nothing is kept."""
        self._file, self._done = file, dict[str, Any]()
        if file is not None:
            self._read(file)

    def __contains__(self, cell: str) -> bool:
        return cell in self._done

    def of(self, cell: str, work: Callable[[], Found]) -> Found:
        """What the work of a cell finds: from the file, or by doing it."""
        if cell in self._done:
            found: Found = self._done[cell]
            return found
        found = work()
        if self._file is not None:
            self._add((cell, found))
        return found

    def _read(self, file: IO[bytes]) -> None:
        end = 0
        try:
            if pickle.load(file) == code_hash():
                end = file.tell()
                while True:
                    cell, found = pickle.load(file)
                    self._done[cell], end = found, file.tell()
        except Exception:  # noqa: BLE001 - whatever cannot be read is done again
            pass
        file.truncate(end)
        file.seek(end)
        if end == 0:
            self._add(code_hash())

    def _add(self, what: object) -> None:
        assert self._file is not None
        self._file.write(pickle.dumps(what))
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def unfinished(path: Path | None) -> Iterator[Unfinished]:
    """The cells that a run keeps in a file of its own, which goes when the block ends well.

    Raises:
        InputError: the file there is another user's, or cannot be opened.
    """
    if path is None:
        yield Unfinished()
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if os.fstat(descriptor).st_uid != os.geteuid():  # reading a pickle runs what it says
            os.close(descriptor)
            raise PermissionError(f"{path} is another user's")
    except OSError as error:
        raise unwritable("--out", error) from error
    with open(descriptor, "r+b") as file:
        yield Unfinished(file)
    path.unlink()
