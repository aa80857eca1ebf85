"""Whether a device may keep a core busy only to wait: not where anybody else would run on it."""

import os
import time
from collections.abc import Callable, Iterable

_LOOK_S = 0.01  # between two looks, of 2 us each
_OF_LOOKS = 4  # an engine that takes a token for a moment is nobody who stays


class FreeCores:
    """The cores of this machine beside the devices of a run that are on it."""

    def __init__(
        self,
        peers: Iterable[int] = (),
        *,
        clock: Callable[[], float] = time.perf_counter,
        runnable: Callable[[], int] | None = None,
    ) -> None:
        """`peers` are the processes of the others; `runnable` counts threads of the machine that want a core."""
        others = list(peers)
        enough = len(others) < len(os.sched_getaffinity(0)) and os.getpid() not in others  # threads share one GIL
        self._most = (os.cpu_count() or 1) + 0.5 if enough else 0.0
        self._clock, self._runnable = clock, runnable or _runnable
        self._mean: float | None = None
        self._next_s = 0.0

    @property
    def any(self) -> bool:
        """Whether one is free, as the mean of the last looks has it."""
        if not self._most:
            return False
        now = self._clock()
        if self._mean is None or now >= self._next_s:
            self._next_s, there = now + _LOOK_S, self._runnable()
            self._mean = there if self._mean is None else self._mean + (there - self._mean) / _OF_LOOKS
        return self._mean <= self._most


def _runnable() -> int:
    """Threads that run or wait for a core, the caller's own among them."""
    with open("/proc/loadavg", "rb", buffering=0) as file:
        return int(file.read(64).split()[3].partition(b"/")[0])
