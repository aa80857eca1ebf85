"""The suites of `splitray evaluate` by name, each a function that returns a Report."""

from __future__ import annotations

from collections.abc import Callable

from splitray.errors import InputError, did_you_mean
from splitray.evaluate import layer_splitting, planners, replacement, splitwise
from splitray.evaluate.options import Options, Tell
from splitray.report.document import Report

SUITES: dict[str, Callable[[Options, Tell], Report]] = {
    "planners": planners.run,
    "splitwise": splitwise.run,
    "replacement": replacement.run,
    "layer-splitting": layer_splitting.run,
}


def run(suite: str, options: Options, *, tell: Tell = lambda _: None) -> Report:
    """Run one suite.

    Raises:
        InputError: there is no such suite, or a file cannot be used.
    """
    if suite not in SUITES:
        raise InputError(
            "--suite",
            expected=f"one of {', '.join(SUITES)}",
            actual=suite,
            remedy=f"correct the name{did_you_mean(suite, SUITES)}",
        )
    return SUITES[suite](options, tell)
