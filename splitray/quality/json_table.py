"""Tables of measurements as JSON files: read, and held to the fields of their dataclasses."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from splitray.errors import InputError

Unfit = Callable[[str, object], InputError]
"""From what was expected and what came to the error that names the file and its remedy."""


def read_json(path: str | Path, unfit: Unfit) -> Any:
    """A file's document.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unfit("a readable JSON file", error) from error


def above_zero(values: Iterable[object], unfit: Unfit) -> None:
    """Refuse perplexities that are no finite numbers above 0.

    Raises:
        InputError: says which they are.
    """
    known = list(values)
    if not all(isinstance(v, int | float) and 0 < v < float("inf") for v in known):
        raise unfit("perplexities above 0", known)


def exactly(entry: Any, kind: type, unfit: Unfit) -> None:
    """Refuse what is no mapping of just the fields of a dataclass.

    Raises:
        InputError: says which keys it should have.
    """
    names = {f.name for f in fields(kind)}
    if not isinstance(entry, Mapping) or set(entry) != names:
        raise unfit(f"the keys {sorted(names)}", sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__)
