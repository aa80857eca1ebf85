"""Answers as JSON Lines, each written as soon as it is known; a file that was left unfinished is taken up again."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from splitray.errors import InputError
from splitray.results import result_file, try_file


class AnswersFile:
    """Where answers go. `done` of them are there, `errors` of these are errors."""

    def __init__(self, stream: TextIO, *, done: int = 0, errors: int = 0, lasting: bool = False) -> None:
        """`lasting`: an answer is on the disk before the next one begins."""
        self._stream, self._lasting = stream, lasting
        self.done, self.errors = done, errors

    def add(self, answer: Mapping[str, Any]) -> None:
        """Write one line."""
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()
        failed = "error" in answer
        if self._lasting and not failed:  # an error is found again in no time
            os.fsync(self._stream.fileno())
        self.done, self.errors = self.done + 1, self.errors + failed


@contextmanager
def answers_file(path: Path | None, stdout: TextIO, asked: Mapping[str, Any], *, anew: bool) -> Iterator[AnswersFile]:
    """The answers of a run that was `asked` for, in a file or, without one, on standard output.

    Raises:
        InputError: the file cannot be written, another run is writing it, or it has something else in it and is not to
            be begun `anew`.
    """
    if path is None:
        yield AnswersFile(stdout)
        return
    if path.exists() and not path.is_file():  # a terminal, a pipe: nothing is read back from it
        try_file(path)
        with path.open("w", encoding="utf-8") as stream:
            yield AnswersFile(stream)
        return
    with result_file(path, asked=asked, anew=anew):
        done, errors, size = _whole(path) if path.exists() else (0, 0, 0)
        with path.open("a", encoding="utf-8") as stream:
            stream.truncate(size)
            yield AnswersFile(stream, done=done, errors=errors, lasting=True)


def _whole(path: Path) -> tuple[int, int, int]:
    """How many answers stand at the beginning of a file, how many of them are errors, and where they end [bytes].

    What is torn at the end was not done.
    """
    done = errors = size = 0
    with path.open("rb") as file:
        for line in file:
            answer = _answer(line)
            if answer is None or answer.get("index") != done:
                if file.read(1):
                    raise InputError(f"--out {path}:{done + 1}", expected=f"the answer of index {done}",
                                     actual=repr(line[:60]), remedy="put it right, or begin with --anew")  # fmt: skip
                break
            done, errors, size = done + 1, errors + ("error" in answer), size + len(line)
    return done, errors, size


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
