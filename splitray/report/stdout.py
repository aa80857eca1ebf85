"""Standard output as a program gives it: to a reader who may leave early, as `head` does, or as one JSON document."""

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

READER_LEFT = 141


class ReaderLeft(SystemExit):
    """Nobody reads standard output any more: the program ends through every cleanup and says nothing.

    The exit code is 128 + SIGPIPE, as a shell shows it of any program whose reader left, so that a script with
    `pipefail` can tell a document that was cut off from a whole one. The signal itself stays ignored: it would also
    come when the socket of a device breaks, which is an error to be told, and it would leave processes behind.
    """

    def __init__(self) -> None:
        super().__init__(READER_LEFT)


class Unwritten(SystemExit):
    """Standard output cannot be written, as its disk is full: told on stderr, and an end through every cleanup."""

    def __init__(self, error: OSError) -> None:
        super().__init__(1)
        with suppress(OSError):
            os.write(2, f"error: standard output: {error.strerror}; give it a place with room\n".encode())


class _Descriptor(io.FileIO):
    """Standard output or standard error, below the buffers: the one place where a lost reader shows."""

    def write(self, data: Any) -> int:
        """All that was taken; of what nobody reads on standard error, everything."""
        try:
            return super().write(data)
        except OSError as error:
            if threading.current_thread() is not threading.main_thread():
                raise  # a library's own business; the main thread learns it by itself
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what still lies in buffers must not break at exit once more
            os.close(nowhere)
            if self.fileno() != 2:
                raise (ReaderLeft() if isinstance(error, BrokenPipeError) else Unwritten(error)) from None
            return len(data)  # a result counts, although nobody hears the messages


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """For a whole program: ends it by `ReaderLeft` once its standard output breaks, at the latest after the block."""
    sys.stdout, sys.stderr = _watched(sys.stdout, 1), _watched(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()


def _watched(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # it was closed when the program began: `>&-`
        return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the program runs
    buffer = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
    lines = bool(descriptor == 2 or stream.line_buffering or getattr(stream, "write_through", False))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=lines)


def print_json(document: dict[str, Any]) -> None:
    """One document in one line."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


@contextmanager
def stdout_kept(wanted: bool) -> Iterator[TextIO]:
    """Keep stdout for results: what libraries and their threads write there goes to stderr meanwhile.

    Gives the stream that still reaches it.
    """
    before = sys.stdout
    if not wanted:
        yield before
        return
    before.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    raw = getattr(getattr(before, "buffer", None), "raw", None)
    lines = _watched(before, kept) if isinstance(raw, io.FileIO) and raw.fileno() == 1 else before
    try:
        with redirect_stdout(sys.stderr):
            yield lines
    finally:
        try:
            lines.flush()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
