"""How busy a device's machine is, and how much memory it has left, as the device itself sees it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from splitray.runtime.wire.answers import MachineLoad

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Busy:
    """Looks from time to time; rates are since the look before."""

    def __init__(self) -> None:
        """Note where the counters stand; the first look tells of the time since."""
        self.machine = _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else os.uname().nodename
        self._last = self._now()

    def look(self) -> MachineLoad:
        """What the machine did since the look before."""
        before, self._last = self._last, self._now()
        took_s, busy_s, own_s = (max(1e-9, b - a) for a, b in zip(before, self._last, strict=True))
        return MachineLoad(
            machine=self.machine,
            cores=psutil.cpu_count() or 1,
            busy_cores=busy_s / took_s,
            own_cores=own_s / took_s,
            free_bytes=psutil.virtual_memory().available,
        )

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests' time is in that of users already.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return time.monotonic(), total - idle, time.process_time()


def rss_anon_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process, this one unless told: mapped files do not count (0 where nobody tells)."""
    try:
        with open(f"/proc/{pid or os.getpid()}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0
