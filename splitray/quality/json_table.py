"""Tables of measurements as JSON files: read, and held to the fields and types of their dataclasses."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from splitray.user_file import UserFile

T = TypeVar("T")


def read_table(file: UserFile, kind: type[T], row_kind: type) -> T:
    """A file's document as a dataclass with `rows`.

    Raises:
        InputError: it cannot be read, a key is missing, unknown or twice there, or a value is of another type.
    """
    document = file.json()
    _exactly(document, kind, file)
    for row in document["rows"] if isinstance(document["rows"], list) else ():
        _exactly(row, row_kind, file)
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise file.wrong(f"a {kind.__name__}", error) from error


def above_zero(values: Iterable[float], file: UserFile) -> None:
    """Refuse perplexities that are no finite numbers above 0.

    Raises:
        InputError: says which they are.
    """
    known = list(values)
    if not all(0 < v < float("inf") for v in known):
        raise file.wrong("perplexities above 0", known)


def _exactly(entry: Any, kind: type, file: UserFile) -> None:
    names = {f.name for f in fields(kind)}
    if not isinstance(entry, Mapping) or set(entry) != names:
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise file.wrong(f"the keys {sorted(names)}", found)
