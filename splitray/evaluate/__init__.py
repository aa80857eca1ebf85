"""`splitray evaluate`: suites that compare planners on equal terms, each a function that returns a Report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from splitray.errors import InputError, did_you_mean
from splitray.report.document import Report

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


def run(suite: str, options: Options, *, tell: Tell = lambda _: None) -> Report:
    """Run one suite.

    Raises:
        InputError: there is no such suite, or a file cannot be used.
    """
    from splitray.evaluate import layer_splitting, planners, replacement, splitwise

    suites: dict[str, Callable[[Options, Tell], Report]] = {
        "planners": planners.run,
        "splitwise": splitwise.run,
        "replacement": replacement.run,
        "layer-splitting": layer_splitting.run,
    }
    if suite not in suites:
        raise InputError("--suite", expected=f"one of {', '.join(suites)}", actual=suite,
                         remedy=f"correct the name{did_you_mean(suite, suites)}")  # fmt: skip
    return suites[suite](options, tell)
