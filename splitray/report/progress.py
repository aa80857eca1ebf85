"""What is being done right now, for whoever watches a terminal; silent everywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(console: Console, first: str, *, every_s: float | None = None) -> Iterator[Callable[[str], None]]:
    """A spinner with a text; gives the function that changes it (an empty text ends it).

    Nothing without a terminal or, with `every_s`, a line at most so often.
    """
    if not console.is_terminal:
        yield _seldom(console, every_s) if every_s else lambda _: None
        return
    with console.status(f"{first} ...") as status:
        yield lambda text: status.update(f"{text} ...") if text else status.stop()


def _seldom(console: Console, every_s: float) -> Callable[[str], None]:
    told_s = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told_s
        if text and time.monotonic() - told_s >= every_s:
            told_s = time.monotonic()
            console.print(text, soft_wrap=True)

    return tell


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left; gives the function that is told how many of how many are done."""
    if not console.is_terminal:
        yield lambda done, of: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, of: shown.update(task, completed=done, total=of)
