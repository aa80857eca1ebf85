"""When to try again: d_n = min(d_max, d_0 2^n) with jitter (docs/equations.md E2.25), and often while a fault is young.

Thirty lines and not a library: the libraries retry a call, and here the engine asks when to look again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from splitray.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """A schedule of looks.

    Args:
        first_s: d_0, behind the young time.
        most_s: d_max.
        young_s: as long a fault is looked at every `often_s`, as most faults end soon.
        budget_s: after which there is no further look.
    """

    first_s: float = 0.25
    most_s: float = 8.0
    young_s: float = 10.0
    often_s: float = 0.2
    budget_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("first_s", "most_s", "young_s", "often_s", "budget_s"):
            value = getattr(self, name)
            if not value >= 0:
                raise InputError(f"{name} of the backoff", expected="at least 0 s", actual=value, remedy="give one")
        if self.most_s < self.first_s:
            raise InputError("most_s of the backoff", expected=f"at least first_s = {self.first_s:g} s",
                             actual=f"{self.most_s:g} s", remedy="raise it, or lower first_s")  # fmt: skip

    def waits(self, rng: random.Random | None = None, *, budget_s: float | None = None) -> Iterator[float]:
        """Seconds before each next look (full jitter in the upper half), until the budget, or another one, is spent."""
        rng, since, n = rng or random.Random(), time.monotonic(), 0
        budget_s = self.budget_s if budget_s is None else budget_s
        while (age := time.monotonic() - since) < budget_s:
            if age < self.young_s:
                yield self.often_s
            else:
                wait = min(self.most_s, self.first_s * 2 ** min(n, 30))
                n += 1
                yield wait * (0.5 + 0.5 * rng.random())
