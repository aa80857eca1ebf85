"""Suites of measurements by name: one table serves a command's help, its check and its error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from splitray.errors import InputError, did_you_mean

Run = TypeVar("Run", bound=Callable)


@dataclass(frozen=True, slots=True)
class Suite(Generic[Run]):
    """What a suite measures, how long that takes on two quiet cores, and the function that does it."""

    measures: str
    takes: str
    run: Run


def suites_help(suites: Mapping[str, Suite[Run]]) -> str:
    """The paragraphs of `--help`, one a suite."""
    return "\n\n".join(f"{name}: {suite.measures} ({suite.takes})." for name, suite in suites.items())


def suite_named(name: str, suites: Mapping[str, Suite[Run]]) -> Suite[Run]:
    """The suite of that name.

    Raises:
        InputError: there is none.
    """
    if name not in suites:
        raise InputError(
            "--suite",
            expected=f"one of {', '.join(suites)}",
            actual=name,
            remedy=f"correct the name{did_you_mean(name, suites)}",
        )
    return suites[name]
