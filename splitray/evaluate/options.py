"""What a user may set for a suite of comparisons, and how a suite tells what it is doing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

Tell = Callable[[str], None]
Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may set for any suite.

    `traces`: bandwidth traces, each as `splitray simulate` takes it; without any, models of links are drawn.
    `arrivals`: likewise; without, Poisson. `workers`: processes that share the cells of the suite `splitwise`.
    """

    traces: tuple[str, ...] = ()
    arrivals: str | None = None
    slots: int = 200
    seed: int = 0
    workers: int = 1


def shared_out(one: Callable[[Job], Found], jobs: Sequence[Job], workers: int) -> Iterator[Found]:
    """What each job finds, in order; so many processes do them, or this one if it is 1."""
    if workers == 1:
        yield from map(one, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, jobs)
