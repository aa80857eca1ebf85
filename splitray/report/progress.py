"""What is being done right now, for whoever watches a terminal; silent everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def progress(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a text; gives the function that changes it (an empty text ends it). Nothing without a terminal."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(f"{first} ...") as status:
        yield lambda text: status.update(f"{text} ...") if text else status.stop()
