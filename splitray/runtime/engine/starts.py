"""Starting devices: each in a thread of its own, again and again by the backoff, while somebody wants it there.

The only place that starts anything. Whoever needs a device says so and waits for a change; no lock is held meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from splitray.errors import DeviceLost
from splitray.runtime.engine.asking import ask
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import Fleet
from splitray.runtime.wire import Endpoint
from splitray.runtime.wire.messages import PingOrder
from splitray.topology import Device

logger = logging.getLogger(__name__)
_PROBE_S = 0.5
_CLOSE_S = 15.0  # that the end of an engine waits for starts that are under way


@dataclass(slots=True)
class _Absent:
    """A device that is being brought back."""

    device: Device
    kept: bool
    """Whether to try again after a failure."""
    old: Endpoint | None
    """Where it listened when it fell silent; None if it has died, or was never started."""
    since: float
    at_once: bool = False
    """Not to wait any longer before the next try."""


class Starts:
    """Brings devices up; `arrived` is told where each one listens."""

    def __init__(self, fleet: Fleet, recovery: Recovery | None, arrived: Callable[[str, Endpoint], None]) -> None:
        """Nothing is started yet."""
        self.restarted: dict[str, list[float]] = {}
        """When devices were started anew with success, within `Recovery.restarts_within_s`."""
        self.failures: dict[str, str] = {}
        """Why devices are not there, as far as they were tried."""
        self._fleet, self._recovery, self._arrived = fleet, recovery or Recovery(), arrived
        self._absent: dict[str, _Absent] = {}
        self._born: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}
        self._changed, self._changes = threading.Condition(), 0
        self._closed = threading.Event()

    def first(self, devices: Iterable[Device]) -> None:
        """Start the devices of a new engine side by side.

        Raises:
            DeviceLost: one does not come up.
        """
        wanted = list(devices)
        for device, endpoint in self._fleet.start(wanted).items():
            self._born.add(device)
            self._arrived(device, endpoint)

    def keep(self, device: Device, old: Endpoint | None = None) -> None:
        """Bring a lost device back in the background, however long it takes.

        One that was only silent (`old` is where it listened) is asked first, and started anew if it stays so.
        """
        self._want(device, old, kept=True)

    def hurry(self) -> None:
        """Try all that are absent now: what kept them away may be over."""
        with self._changed:
            for absent in self._absent.values():
                absent.at_once = True
            self._changed.notify_all()

    def bring(self, devices: Iterable[Device]) -> None:
        """Start devices side by side, once each, and wait for all of them.

        Raises:
            DeviceLost: one does not come up.
        """
        wanted = {str(d.id): d for d in devices}
        with self._changed:
            for device in wanted:
                self.failures.pop(device, None)
        for each in wanted.values():
            self._want(each, None, kept=False)
        self.hurry()
        with self._changed:
            while waiting := [d for d in wanted if d in self._absent]:
                failed = [self.failures[d] for d in waiting if d in self.failures]
                if failed or self._closed.is_set():
                    break
                self._changed.wait()
            failed = [self.failures[d] for d in wanted if d in self.failures]
        if failed or self._closed.is_set():
            raise DeviceLost("; ".join(failed) or "the engine is closed")

    @property
    def absent(self) -> list[str]:
        """Devices that are being brought back."""
        return list(self._absent)

    def was_there(self, device: str) -> bool:
        """Whether a device has ever been started."""
        return device in self._born

    @property
    def changes(self) -> int:
        """Grows whenever a device came up or failed to."""
        return self._changes

    def wait(self, since: int, within_s: float) -> None:
        """Wait for a change after `changes` was `since`, but not for long."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != since or self._closed.is_set(), timeout=within_s)

    def worn_out_s(self, device: str) -> float:
        """Seconds until a device may be started anew; infinite if never, 0 if now.

        What counts is how often it died after it had been started, not how often it was tried.
        """
        if device not in self._born:
            return 0.0
        if self._recovery.restarts == 0:
            return math.inf
        recent, most = self._recent(device), self._recovery.restarts
        within_s = self._recovery.restarts_within_s
        return max(0.0, recent[-most] + within_s - time.monotonic()) if len(recent) >= most else 0.0

    def _recent(self, device: str) -> list[float]:
        since = time.monotonic() - self._recovery.restarts_within_s
        return [t for t in self.restarted.get(device, ()) if t > since]

    def stop(self) -> None:
        """Try no more from now on; waits for nothing."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for what was under way at `stop`; the fleet is closed, so that it cannot come up any more."""
        self.stop()
        give_up = time.monotonic() + _CLOSE_S
        for thread in list(self._threads.values()):
            thread.join(max(0.0, give_up - time.monotonic()))

    def _want(self, device: Device, old: Endpoint | None, *, kept: bool) -> None:
        with self._changed:
            if self._closed.is_set():
                return
            absent = self._absent.get(device.id)
            if absent is not None:
                absent.device, absent.kept = device, absent.kept or kept
                return
            self._absent[device.id] = _Absent(device, kept, old, time.monotonic())
            thread = self._threads[device.id] = threading.Thread(
                target=self._run, args=(device.id,), name=f"splitray-start-{device.id}", daemon=True
            )
        thread.start()

    def _run(self, device: str) -> None:
        waits = self._recovery.backoff.waits(budget_s=math.inf)  # a board may come back in an hour
        absent = self._absent[device]
        while True:
            why = self._attempt(absent)
            with self._changed:
                self._changes += 1
                if why is None:
                    self.failures.pop(device, None)
                elif self.failures.get(device) != why:
                    self.failures[device] = why
                    logger.info("%s: not there yet: %s", device, why)
                ends = why is None or not absent.kept or self._closed.is_set()
                if ends:
                    del self._absent[device], self._threads[device]
                self._changed.notify_all()
            if ends:
                return
            self._pause(absent, max(next(waits), self.worn_out_s(device)))

    def _pause(self, absent: _Absent, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: absent.at_once or self._closed.is_set(), timeout=min(seconds, threading.TIMEOUT_MAX)
            )
            absent.at_once = False

    def _attempt(self, absent: _Absent) -> str | None:
        """Try once; why it did not come up, or None if it is there."""
        device = str(absent.device.id)
        try:
            if absent.old is not None:
                if self._answers(device, absent.old):
                    self._arrived(device, absent.old)
                    return None
                if time.monotonic() - absent.since < self._recovery.patience_s and device not in self._fleet.dead():
                    return f"{device} gives no answer"
                absent.old = None
            if self.worn_out_s(device) > 0:
                most, within_s = self._recovery.restarts, self._recovery.restarts_within_s
                return f"{device} has been started anew {most} times in {within_s:g} s"
            endpoint = self._fleet.restart(absent.device)
        except Exception as error:  # noqa: BLE001 - a boundary: no process, no memory, no file, no room, no answer
            return str(error) if isinstance(error, DeviceLost) else f"{device}: {type(error).__name__}: {error}"
        if device in self._born:
            self.restarted[device] = [*self._recent(device), time.monotonic()]
        self._born.add(device)
        self._arrived(device, endpoint)
        return None

    def _answers(self, device: str, endpoint: Endpoint) -> bool:
        try:
            return bool(ask({device: PingOrder()}, {device: endpoint}, self._fleet.token, within_s=_PROBE_S))
        except DeviceLost:
            return False
