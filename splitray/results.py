"""Where a run's results go: tried before the work begins, one run at a time, and each file whole or not at all.

Knows no command. `unfinished.py` keeps what a long run has done until its results are there.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitray.errors import InputError, unwritable

RECORD = "run.json"
"""In a folder of results: what was asked for."""
_ROOM_BYTES = 4096


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write a file beside its place, and put it there: whatever happens, it is the old one or the new one.

    Its folder is made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    target, data = Path(os.path.realpath(path)), content.encode() if isinstance(content, str) else content
    if target.exists() and not target.is_file():  # a terminal, a pipe: nothing can be put in its place
        with target.open("wb") as file:
            file.write(data)
        return Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return Path(path)


def try_file(path: str | Path, what: str = "--out") -> None:
    """Refuse a file that cannot be written, before the work that it is for; its folder is made if it is not there.

    Raises:
        InputError: says why not.
    """
    try:
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if target.exists():
            os.close(os.open(target, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
        if target.is_file() or not target.exists():
            _try_folder(target.parent)
    except (OSError, ValueError) as error:
        raise unwritable(what, error, expected="a file that can be written") from error


@contextmanager
def result_file(
    path: str | Path, what: str = "--out", *, asked: Mapping[str, Any] | None = None, anew: bool = False
) -> Iterator[None]:
    """A file that no other run writes for the length of the block, tried as `try_file` does.

    What was `asked` for is written beside a file that a later run may go on with, and compared with what lies there;
    `anew`: such a file is emptied first.

    Raises:
        InputError: it cannot be written, another run is writing it, or it has something else than results of this one.
    """
    try_file(path, what)
    beside = Path(path).with_name(f".{Path(path).name}.lock")
    try:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(what, error, expected="a file that can be written") from error
    try:
        _lock(lock, Path(path), what)
        if asked is not None:
            _take_up(Path(path), json.loads(json.dumps(asked, default=str)), what, anew)
        yield
        beside.unlink(missing_ok=True)
    finally:
        os.close(lock)


@contextmanager
def result_folder(path: Path, asked: Mapping[str, Any] | None = None, *, what: str = "--out") -> Iterator[Path]:
    """A folder that no other run writes into for the length of the block; made if it is not there.

    What was `asked` for is written into it, and compared with what lies there.

    Raises:
        InputError: it cannot be written, another run is writing into it, or it has the results of another one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _try_folder(path)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError) as error:
        raise unwritable(what, error) from error
    try:
        _lock(folder, path, what)
        if asked is not None:
            _compare(path / RECORD, json.loads(json.dumps(asked, default=str)), what)
            _note(path / RECORD, asked, what)
        yield path
    finally:
        os.close(folder)


def _try_folder(path: Path) -> None:
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(_ROOM_BYTES))
        file.flush()


def _lock(folder: int, path: Path, what: str) -> None:
    """Held by the open folder, and so no longer than the process lives."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        remedy = "wait for it, or give another place"
        raise InputError(what, expected="results of this run alone", actual=f"another run is writing {path}",
                         remedy=remedy) from error  # fmt: skip
    except OSError:  # a file system without locks
        return


def _take_up(path: Path, asked: Mapping[str, Any], what: str, anew: bool) -> None:
    record = path.with_name(f".{path.name}.{RECORD}")
    if anew and path.exists():
        with path.open("w") as file:
            os.fsync(file.fileno())  # the old results must not outlive what they are results of
    if path.exists() and path.stat().st_size:
        if not record.is_file():
            raise InputError(what, expected="a new file, or one that this command has begun", actual=path,
                             remedy="give another file, or begin with --anew")  # fmt: skip
        _compare(record, asked, what, "file", path, "give another file, or begin with --anew")
    _note(record, asked, what)


def _compare(
    record: Path,
    asked: Mapping[str, Any],
    what: str,
    kind: str = "folder",
    results: Path | None = None,
    remedy: str = "give another folder, or delete this one",
) -> None:
    try:
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict) and before != asked:
        told = [k for k in {**asked, **before} if asked.get(k) != before.get(k)]
        wanted, there = (", ".join(f"{k} {of.get(k)!r}" for k in told) for of in (asked, before))
        actual = f"{results or record.parent} has the results of {there}"
        raise InputError(what, expected=f"a {kind} for {wanted}", actual=actual, remedy=remedy)


def _note(record: Path, asked: Mapping[str, Any], what: str) -> None:
    try:
        write_whole(record, json.dumps(asked, indent=1, default=str) + "\n")
    except OSError as error:
        raise unwritable(what, error) from error
