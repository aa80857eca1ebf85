"""How a device waits for frames in a run: asleep until shortly before one is due, then looking again and again.

A process that the arrival of its frame has to wake is late by more than the frame took, and finds its core cold.
Decode steps are alike, so the steps before tell when each boundary's frame is due. Knows nothing of what frames carry.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from splitray.runtime.wire.free_cores import FreeCores

_KEPT, _EARLY = 8, 1  # of the last steps' waits the second least counts
_MARGIN_S = 150e-6  # a sleep is that much shorter than the wait: a timer is some 70 us late itself
_LATE_S = 200e-6  # of looking for a frame that is due; then it sleeps until it comes
_LONGEST_S = 0.05  # a longer wait gains nothing


class Arrivals(Protocol):
    """What a peer's frames come by."""

    peer: str

    def has_come(self) -> bool:
        """Whether there is something to read."""


class Waits:
    """A device's waits at the boundaries of a step."""

    def __init__(
        self,
        cores: FreeCores,
        *,
        spin_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is known yet. With `spin_s` it looks for so long at every boundary, whoever else wants the core."""
        self.alike = False
        """Whether the step is one of those that are alike: of one token for each sequence."""
        self._cores, self._spin_s, self._clock, self._sleep = cores, spin_s, clock, sleep
        self._past: dict[tuple[str, int], deque[float]] = {}
        self._now: deque[float] | None = None
        self._began = 0.0

    def forget(self) -> None:
        """Another run begins."""
        self.alike, self._now = False, None
        self._past.clear()

    def begin(self, arrivals: Arrivals, boundary: int) -> None:
        """Let time pass until something has come or is later than it should be; then receive, and call `end`."""
        if self._spin_s:
            self._look(arrivals, self._clock() + self._spin_s)
        elif self.alike:
            self._wait(arrivals, boundary)

    def _wait(self, arrivals: Arrivals, boundary: int) -> None:
        past = self._past.get((arrivals.peer, boundary))
        if past is None:
            past = self._past[arrivals.peer, boundary] = deque(maxlen=_KEPT)
        began = self._clock()
        if not arrivals.has_come():
            if not self._cores.any:
                return
            due_s = sorted(past)[_EARLY] if len(past) == _KEPT else 0.0
            if due_s > _LONGEST_S:
                return
            if due_s > 2 * _MARGIN_S:
                self._sleep(due_s - _MARGIN_S)
                if arrivals.has_come():  # nobody knows since when
                    past.append(due_s - 2 * _MARGIN_S)
                    return
            self._look(arrivals, max(began + due_s, self._clock()) + _LATE_S)
        self._now, self._began = past, began

    def _look(self, arrivals: Arrivals, until_s: float) -> None:
        while not arrivals.has_come() and self._clock() < until_s:
            pass

    def end(self) -> None:
        """It has been received."""
        if self._now is not None:
            self._now.append(self._clock() - self._began)
            self._now = None
