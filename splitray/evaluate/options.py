"""What a user may set for a suite of comparisons, and how a suite tells what it is doing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TypeVar

from splitray.unfinished import Unfinished

Tell = Callable[[str], None]
Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may set for any suite.

    `traces`: bandwidth traces, each as `splitray simulate` takes it; without any, models of links are drawn.
    `arrivals`: likewise; without, Poisson. `workers`: processes that share the cells of the suite `splitwise`. `done`:
    what an earlier run that was ended has found.
    """

    traces: tuple[str, ...] = ()
    arrivals: str | None = None
    slots: int = 200
    seed: int = 0
    workers: int = 1
    done: Unfinished = field(default_factory=Unfinished, compare=False)


def shared_out(
    one: Callable[[Job], Found], jobs: Sequence[Job], options: Options, name: Callable[[Job], str]
) -> Iterator[Found]:
    """What each job finds, in order; so many processes as there are workers do them, or this one if it is 1."""
    missing = [job for job in jobs if name(job) not in options.done]
    with ExitStack() as stack:
        if options.workers == 1:
            found: Iterator[Found] = map(one, missing)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")))
            found = pool.map(one, missing)
        for job in jobs:
            yield options.done.of(name(job), lambda: next(found))
