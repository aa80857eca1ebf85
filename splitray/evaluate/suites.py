"""The suites of `splitray evaluate` by name. Each is imported when it runs, so that a help text loads none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from splitray.evaluate.options import Options, Tell
from splitray.report.suite import Suite, suite_named

if TYPE_CHECKING:
    from splitray.report.document import Report


def _of(module: str) -> Callable[[Options, Tell], Report]:
    return lambda options, tell: import_module(f"splitray.evaluate.{module}").run(options, tell)


SUITES: dict[str, Suite[Callable[[Options, Tell], Report]]] = {
    "planners": Suite(
        "every planner but the learned ones, over traces, on clusters and against the optimum",
        "three minutes",
        _of("planners"),
    ),
    "gaps": Suite(
        "planners against the exact optimum on small random instances, with pinned ends and without",
        "a minute",
        _of("gaps"),
    ),
    "splitwise": Suite(
        "the learned policy and all others, where many edges share one cloud", "an hour", _of("splitwise")
    ),
    "replacement": Suite(
        "placements that change while tokens are generated over a link that a trace drives",
        "some minutes",
        _of("replacement"),
    ),
    "layer-splitting": Suite(
        "the figures and tables of Chen et al. (arXiv 2406.02616) on the shipped model",
        "a quarter of an hour",
        _of("layer_splitting"),
    ),
}


def run(suite: str, options: Options, *, tell: Tell = lambda _: None) -> Report:
    """Run one suite.

    Raises:
        InputError: there is no such suite, or a file cannot be used.
    """
    chosen, started = suite_named(suite, SUITES), time.perf_counter()
    report = chosen.run(options, tell)
    seconds = round(time.perf_counter() - started, 1)
    return replace(report, facts={"splitray": version("splitray"), "suite": suite, **report.facts, "seconds": seconds})
