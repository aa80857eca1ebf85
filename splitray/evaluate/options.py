"""What a user may set for a suite of comparisons, and how a suite tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Tell = Callable[[str], None]


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
