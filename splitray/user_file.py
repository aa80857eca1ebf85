"""One file that a user names: opened only if it is a plain one, read in bounds, as text or as JSON, or refused.

What gzip packed is unpacked, whatever the file is called. Knows no keys, columns or models.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from splitray.errors import InputError

MOST_BYTES = 20_000_000  # of a document: four times as much where its characters are wide
MOST_VALUES = 250_000  # in a document, keys counted: they take 3 us and 200 bytes each
_OTHERS = {  # how files begin that are no text, and what to do
    b"\x28\xb5\x2f\xfd": ("a file packed by zstd", "unpack it (zstd -d)"),
    b"BZh": ("a file packed by bzip2", "unpack it (bunzip2)"),
    b"\xfd7zXZ\x00": ("a file packed by xz", "unpack it (unxz)"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV in UTF-8"),
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
            mode = os.stat(self.path).st_mode
            if not stat.S_ISREG(mode):
                found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
                raise self.wrong("a plain file", found, remedy=None if stat.S_ISDIR(mode) else "write it to a file")
            with open(self.path, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        except (OSError, EOFError, zlib.error) as error:
            raise self.wrong("a readable file", error) from error
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
        return self.decoded(self.raw(most_bytes))

    def decoded(self, raw: bytes, line: int | None = None) -> str:
        """Some of its bytes, from the beginning or from a line on, as text in UTF-8.

        Raises:
            InputError: they are something else; says what.
        """
        if not line or line == 1:
            for begin, (found, remedy) in _OTHERS.items():
                if raw.startswith(begin):
                    raise self.wrong("a text in UTF-8", found, remedy=remedy)
        try:
            text = raw.decode("utf-8-sig" if not line or line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = line or 1 + raw[: error.start].count(b"\n")
            found = f"the byte 0x{raw[error.start]:02x}"
            raise self.wrong("a text in UTF-8", found, line=at, remedy="save it in UTF-8") from error
        if (end := text.find("\0")) >= 0:
            found, remedy = "a NUL: another kind of file, or text in UTF-16", "save it in UTF-8"
            raise self.wrong("a text in UTF-8", found, line=line or 1 + text.count("\n", 0, end), remedy=remedy)
        return text

    def json(self) -> Any:
        """Its JSON document: as Python reads it, NaN and Infinity included, but no key may stand twice.

        Raises:
            InputError: see `text`, or it is no such document.
        """
        return self.parsed(self.text())

    def parsed(self, text: str) -> Any:
        """A JSON document of it.

        Raises:
            InputError: it is none; says what is wrong and where.
        """
        if sum(map(text.count, ",{[")) > MOST_VALUES:
            raise self.wrong(f"at most {MOST_VALUES:,} values", "more", remedy="give a smaller file")
        try:
            return json.loads(text, object_pairs_hook=self._once)
        except json.JSONDecodeError as error:
            raise self.wrong("a JSON document", error.msg, line=error.lineno) from error
        except RecursionError as error:
            raise self.wrong("a JSON document", "brackets nested too deep") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise self.wrong("a JSON document", "a number of thousands of digits") from error

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise self.wrong("each key of an object once", f"{twice!r} twice", remedy="remove one of them")
        return found
