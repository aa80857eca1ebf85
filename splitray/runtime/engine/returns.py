"""What is done about devices beside the runs, as long as the engine lives: one thread looks every tenth of a second.

Who dies off the route is left and brought back; who is there again gets pieces, in any placement that the planner has
for those that are there; others hold the slices ready of whom the engine stands by for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

from splitray.errors import DeviceFailed, DeviceLost, InputError
from splitray.runtime.engine.epoch import Epoch, Next
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.next_step import NextStep, next_step
from splitray.runtime.engine.succession import Succession

logger = logging.getLogger(__name__)
_TICK_S = 0.1
_REACH_S = 0.5


class Returns:
    """Keeps the devices of an engine complete."""

    def __init__(
        self,
        members: Members,
        succession: Succession,
        *,
        move: Callable[[NextStep], Next],
        mend: Callable[[str], bool],
        ready: Callable[[Epoch], None],
    ) -> None:
        """Nobody is missing.

        `move` lets a placement take over beside the runs; `mend` sees to a fault that no run is there to meet, and says
        whether there is nothing left to do; `ready` lets others stand by in an epoch.
        """
        self._members, self._succession = members, succession
        self._move, self._mend, self._ready = move, mend, ready
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._coming: Next | None = None
        self._broken: str | None = None
        """The fault of the route that no run has met yet."""
        self._refused: dict[str, float] = {}
        """Until when devices are not asked again that were back with what cannot be used."""
        self._looked: tuple[frozenset[str], int] | None = None
        """The devices that were there when the planner was asked last, and the epoch."""
        self._incomplete_s: float | None = None
        self._again_s = 0.0
        self._waits = self._schedule()

    @property
    def _missing(self) -> set[str]:
        """Devices that are to be there and are not."""
        return set(self._members.starts.absent)

    def start(self) -> None:
        """Look from now on, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="splitray-return", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _schedule(self) -> Iterator[float]:
        assert self._members.recovery is not None, "asked for"
        return self._members.recovery.backoff.waits(budget_s=math.inf)

    def _run(self) -> None:
        while not self._closed.wait(_TICK_S) and self._members.lost is None:
            try:
                if not self._members.disturbed:
                    self._look()
            except Exception as error:  # noqa: BLE001 - a boundary: the next look may find it mended
                self._members.warn_once(f"looking after the devices: {type(error).__name__}: {error}")

    def _look(self) -> None:
        members, succession = self._members, self._succession
        recovery, now = members.recovery, succession.now
        assert recovery is not None, "asked for"
        dead = members.dead()
        if of_route := {d: why for d, why in dead.items() if d in now.route.devices}:
            self._broken = "; ".join(f"{d}: {why}" for d, why in of_route.items())
        if self._broken is not None:
            self._mend_broken(self._broken)
            return
        for device in dead:
            members.leave(device)
        if recovery.fail_back:
            succession.call_back(others=self._incomplete_for() > recovery.patience_s)
        for device in members.endpoints.keys() - set(members.connected):
            self._greet(device)
        if self._coming is not None and not self._ended(self._coming):
            return
        if time.monotonic() < self._again_s:
            return
        try:
            if not self._step():
                self._ready(succession.now)
        except (InputError, DeviceLost, DeviceFailed) as error:
            self._failed(error)

    def _mend_broken(self, why: str) -> None:
        """Look once whether the route can be mended, and again later if not; a run that begins does it itself."""
        if time.monotonic() >= self._again_s:
            if self._mend(why):
                self._broken = None
                self._waits, self._again_s = self._schedule(), 0.0
            else:
                self._again_s = time.monotonic() + next(self._waits)

    def _incomplete_for(self) -> float:
        """Seconds since when less than what is wanted runs."""
        if self._succession.now.placement == self._succession.whole.placement:
            self._incomplete_s = None
            return 0.0
        self._incomplete_s = self._incomplete_s or time.monotonic()
        return time.monotonic() - self._incomplete_s

    def _greet(self, device: str) -> None:
        """Connect to a device off the route; one that gives no answer is brought back like a dead one."""
        members, topology = self._members, self._succession.whole.topology
        try:
            members.reach(device)
        except DeviceLost:
            if not members.disturbed and device in topology.ids and device not in self._succession.now.route.devices:
                members.lose(topology, device)

    def _step(self) -> bool:
        """Begin a move if one is due."""
        members, succession = self._members, self._succession
        refused = {d for d, until_s in self._refused.items() if time.monotonic() < until_s}
        usable = frozenset(members.connected) - refused
        seen = succession.seen(usable)
        if seen.moving or self._looked == (usable, succession.now.number):
            return False
        step = next_step(succession.wanted(0), seen)
        if step.kind == "move":
            self._check_ways(succession.now.moved(step.placement, step.topology, -1))
            self._coming = self._move(step)
            return True
        self._looked = usable, succession.now.number
        return False

    def _check_ways(self, epoch: Epoch) -> None:
        """Refuse an epoch whose devices do not reach each other yet: a switch to it would stop the run.

        Raises:
            DeviceLost: says who does not reach whom.
        """
        for device, unreached in self._members.unreached(epoch.dials(), within_s=_REACH_S).items():
            raise DeviceLost(f"{device} does not reach {', '.join(unreached)}")

    def _ended(self, coming: Next) -> bool:
        """Whether a move has come to its end, and what follows."""
        if not coming.done.is_set():
            return False
        self._coming = None
        if coming.error is None:
            self._waits, self._again_s = self._schedule(), 0.0
        else:
            self._failed(coming.error)
        return True

    def _failed(self, error: Exception) -> None:
        self._looked = None
        again_s = time.monotonic() + next(self._waits)
        refusing = getattr(error, "devices", ())
        if refusing:  # the others need not wait for it
            self._refused |= dict.fromkeys(refusing, again_s)
            self._members.warn_once(f"{', '.join(refusing)}: back with what cannot be used: {error}")
        else:
            self._again_s = again_s
            logger.info("not complete yet: %s", error)
