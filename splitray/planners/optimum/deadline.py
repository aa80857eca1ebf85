"""When a search has to end with what it has: every long loop of optimum/ asks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitray.errors import InputError


class OutOfTime(Exception):  # noqa: N818 - no error: the search answers with the best that it has found
    """The time that a search was given is up."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of a clock, in seconds; by default it never comes."""

    at_s: float = math.inf
    clock: Callable[[], float] = time.monotonic

    @staticmethod
    def within(limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> "Deadline":
        """So many seconds from now, None for no limit.

        Raises:
            InputError: the limit is no number of seconds above 0.
        """
        if limit_s is None:
            return NEVER
        if not 0 < limit_s < math.inf:
            remedy = "write for example --limit-s 20"
            raise InputError("limit_s", expected="a number of seconds above 0", actual=limit_s, remedy=remedy)
        return Deadline(clock() + limit_s, clock)

    def check(self) -> None:
        """Go on, or raise `OutOfTime`."""
        if self.at_s < math.inf and self.clock() >= self.at_s:
            raise OutOfTime


NEVER = Deadline()
