"""One file that a user names: opened only if it is a plain one, read in bounds, as text, lines or JSON, or refused.

What gzip packed is unpacked, whatever the file is called. Knows no keys, columns or models.
"""

import gzip
import io
import itertools
import json
import logging
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from splitray.errors import InputError

logger = logging.getLogger(__name__)
MOST_BYTES = 20_000_000  # of a document: four times as much where its characters are wide
_MOST_LINES, _MOST_LINE = 5_000_000, 65_536  # of a table, and characters of one
_TELL_S = 2.0
_TEXT, _NUL = "a text in UTF-8", "a NUL: another kind of file, or text in UTF-16"
MOST_VALUES = 250_000  # in a document, keys counted: they take 3 us and 200 bytes each
_OTHERS = {  # how files begin that are no text, and what to do
    b"\x28\xb5\x2f\xfd": ("a file packed by zstd", "unpack it (zstd -d)"),
    b"BZh": ("a file packed by bzip2", "unpack it (bunzip2)"),
    b"\xfd7zXZ\x00": ("a file packed by xz", "unpack it (unxz)"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook of the old kind", "save the sheet as CSV in UTF-8"),
    b"PAR1": ("a Parquet file", "write it as CSV in UTF-8"),
    b"\xff\xfe": ("text in UTF-16", "save it in UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it in UTF-8"),
}


@dataclass(frozen=True, slots=True)
class UserFile:
    """A file by its path, what it should hold in a word or two, and what to do where it does not."""

    path: str | Path
    kind: str
    remedy: str
    refusal: type[InputError] = InputError

    def wrong(self, expected: str, actual: object, *, line: int | None = None, remedy: str | None = None) -> InputError:
        """The error that names the file, and the line if there is one."""
        what = f"{self.kind} {self.path}" + (f":{line}" if line else "")
        return self.refusal(what, expected=expected, actual=actual, remedy=remedy or self.remedy)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Its bytes, unpacked. What fails while they are read is refused, too.

        Raises:
            InputError: there is no such file, it cannot be read, or it is no plain file: pipes and devices may never
                end.
        """
        try:
            path = os.path.expanduser(self.path)  # behind `columns:` no shell does it
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
                raise self.wrong("a plain file", found, remedy=None if stat.S_ISDIR(mode) else "write it to a file")
            with open(path, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        except (OSError, EOFError, zlib.error) as error:
            remedy = "correct the path" if isinstance(error, FileNotFoundError) else None
            raise self.wrong("a readable file", error, remedy=remedy) from error
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError | InputError):
                raise
            raise self.wrong("a readable file", error) from error  # a path with NUL

    @contextmanager
    def understood(self) -> Iterator[None]:
        """What fails while sense is made of its document is refused: keys that are missing, values of another type.

        Raises:
            InputError: something does.
        """
        try:
            yield
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self.wrong("another document", f"{type(error).__name__}: {error}") from error

    def raw(self, most_bytes: int = MOST_BYTES) -> bytes:
        """All its bytes.

        Raises:
            InputError: see `opened`, or there are more.
        """
        with self.opened() as file:
            found = file.read(most_bytes + 1)
        if len(found) > most_bytes:
            raise self.wrong(f"at most {most_bytes:,} bytes", "more", remedy="give a smaller file")
        return found

    def text(self, most_bytes: int = MOST_BYTES) -> str:
        """All of it as text in UTF-8; a byte-order mark is left out.

        Raises:
            InputError: see `raw`, or it is no such text.
        """
        raw = self.raw(most_bytes)
        self._refuse_others(raw[:8])
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            at = 1 + raw[: error.start].count(b"\n")
            raise self._no_text(f"the byte 0x{raw[error.start]:02x}", at) from error
        if (end := text.find("\0")) >= 0:
            raise self._no_text(_NUL, 1 + text.count("\n", 0, end))
        return text

    def lines(self) -> Iterator[tuple[int, str]]:
        """Its lines of text in UTF-8 with their numbers from 1 on, whatever ends them; memory for one at a time.

        Raises:
            InputError: see `opened`, or it is no such text, or has too many lines or one that is too long.
        """
        with self.opened() as raw:
            self._refuse_others(raw.read(8))
            raw.seek(0)
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape")
            told_s = time.monotonic()
            for number in itertools.count(1):
                line = text.readline(_MOST_LINE + 1)
                if not line:
                    return
                if len(line) > _MOST_LINE or number > _MOST_LINES:
                    many = f"{_MOST_LINES:,} lines of {_MOST_LINE:,} characters"
                    raise self.wrong(f"at most {many}", "more", line=number, remedy="cut the file")
                if not line.isascii() and (odd := [c for c in line if "\udc80" <= c <= "\udcff"]):
                    raise self._no_text(f"the byte 0x{ord(odd[0]) - 0xDC00:02x}", number)
                if "\0" in line:
                    raise self._no_text(_NUL, number)
                if number % 10_000 == 0 and time.monotonic() - told_s > _TELL_S:
                    told_s = time.monotonic()
                    logger.warning("reading %s %s: %s lines so far", self.kind, self.path, f"{number:,}")
                yield number, line.rstrip("\n")

    def raw_lines(self, most_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Its lines as bytes with their numbers from 1 on; memory for one at a time.

        Of a line that is longer than so many bytes, as many and one more: whoever reads it may refuse that line alone.

        Raises:
            InputError: see `opened`, or it is of another kind than text in UTF-8.
        """
        with self.opened() as raw:
            self._refuse_others(raw.read(8))
            raw.seek(0)
            for number in itertools.count(1):
                line = rest = raw.readline(most_bytes + 1)
                while rest and not rest.endswith(b"\n"):
                    rest = raw.readline(_MOST_LINE)
                if not line:
                    return
                yield number, line

    def _refuse_others(self, begin: bytes) -> None:
        for known, (found, remedy) in _OTHERS.items():
            if begin.startswith(known):
                raise self.wrong(_TEXT, found, remedy=remedy)

    def _no_text(self, found: str, line: int) -> InputError:
        return self.wrong(_TEXT, found, line=line, remedy="save it in UTF-8")

    def json(self, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES) -> Any:
        """Its JSON document: as Python reads it, NaN and Infinity included, but no key may stand twice.

        Raises:
            InputError: see `text`, or it is no such document.
        """
        return self.parsed(self.text(most_bytes), most_values=most_values)

    def parsed(self, text: str, line: int | None = None, *, most_values: int = MOST_VALUES) -> Any:
        """A JSON document of it, which is on a line of its own if one is named.

        Raises:
            InputError: it is none; says what is wrong and where.
        """
        if sum(map(text.count, ",{[")) > most_values:
            raise self.wrong(f"at most {most_values:,} values", "more", remedy="give a smaller file")
        try:
            return json.loads(text, object_pairs_hook=partial(self._once, line))
        except json.JSONDecodeError as error:
            raise self.wrong("a JSON document", error.msg, line=(line or 1) - 1 + error.lineno) from error
        except RecursionError as error:
            raise self.wrong("a JSON document", "brackets nested too deep", line=line) from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise self.wrong("a JSON document", "a number of thousands of digits", line=line) from error

    def _once(self, line: int | None, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise self.wrong("each key of an object once", f"{twice!r} twice", line=line, remedy="remove one of them")
        return found
