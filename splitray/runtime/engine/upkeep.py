"""What changes under an engine while no device is at work: a staged placement takes over, or a fault is mended.

That is between two segments of a run, or while there is none. It decides no placement.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from splitray.errors import DeviceFailed, DeviceLost, InputError, PlacementError
from splitray.placement import Placement
from splitray.runtime.engine.epoch import Epoch, Kept, Next
from splitray.runtime.engine.heirs import refuse_new_formats
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.next_step import NextStep
from splitray.runtime.engine.recovery import Fault, make_ready, recovered
from splitray.runtime.engine.returns import Returns
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.stepping import Steps
from splitray.runtime.engine.succession import Succession
from splitray.topology import Topology

logger = logging.getLogger(__name__)
_LOOK_S = 0.01  # one look, no wait for anything
_KEPT = 1000  # faults that are remembered


class Upkeep:
    """Lets the placement and the devices of one engine change without harm to the sessions on them."""

    def __init__(self, members: Members, succession: Succession, steps: Steps) -> None:
        """All is well, and nothing runs."""
        self.session: Session | None = None
        """The run that goes on, or None."""
        self.faults: list[Fault] = []
        """The last ones that were mended."""
        self.working = threading.Lock()
        """Held while the devices are at work: one run, step or question at a time."""
        self.returns: Returns | None = None
        """Looks after devices beside the runs; None without a `Recovery`."""
        self._members, self._succession, self._steps = members, succession, steps
        self._ready_for: int | None = None
        self._stuck = (0, 0), 0.0, 0
        """Session and token at which the last fault was met, since when, and how many in a row."""

    def begin(self) -> None:
        """The first epoch runs: let others stand by, and look after the devices from now on."""
        self.ready(self._succession.now)
        if self._members.recovery is not None:
            self.returns = Returns(
                self._members, self._succession, move=self._follow, mend=self._mend_at_rest, ready=self.ready
            )
            self.returns.start()

    def ready(self, epoch: Epoch) -> None:
        """Let others hold what they need if a device is lost in an epoch, unless they do."""
        if epoch.number != self._ready_for:
            make_ready(self._members, epoch)
            self._ready_for = epoch.number

    def _ready_in_time(self, epoch: Epoch) -> None:
        """The same before an epoch runs; what fails is tried again behind the switch, and keeps nobody from moving."""
        with contextlib.suppress(DeviceFailed, DeviceLost, InputError):
            self.ready(epoch)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody else have the devices work; what was staged meanwhile takes over behind it.

        Raises:
            DeviceLost: nothing can run any more.
        """
        with self.working:
            self._members.usable()
            yield
        self._take_over_at_rest()

    def migrate(
        self, placement: Placement, topology: Topology, *, copies_kv: bool = True, lasting: bool = False
    ) -> Next:
        """See `Engine.migrate`."""
        if self._lives:
            refuse_new_formats(self._succession.now.placement, placement, self._succession.now.arch)
        coming = self._succession.begin(placement, topology, copies_kv, lasting=lasting)

        def prepare() -> None:
            self._succession.prepare(coming, self._kept, self._ready_in_time)
            self._take_over_at_rest()  # if there is no run, nobody else does

        threading.Thread(target=prepare, name="splitray-stage", daemon=True).start()
        return coming

    @property
    def _lives(self) -> bool:
        """Whether there is a session that has begun."""
        return bool(self._steps.kept()) or (self.session is not None and bool(self.session.steps))

    def _follow(self, step: NextStep) -> Next:
        return self.migrate(step.placement, step.topology)

    def _kept(self, coming: Next) -> list[Kept]:
        """The sessions whose KV has to move with a placement."""
        kept, session = self._steps.kept(), self.session
        if session is not None and session.steps and coming.copies_kv:
            kept.append(Kept(number=session.number, capacity=session.capacity, stop=session.positions))
        return kept

    def take_over(self) -> None:
        """Let the staged placement run, if there is one: only between segments, with `working` held.

        Raises:
            DeviceLost: a device is gone.
        """
        coming, session = self._succession.staged, self.session
        if coming is not None:
            try:
                if self._lives:  # since it was begun
                    refuse_new_formats(self._succession.now.placement, coming.epoch.placement, coming.epoch.arch)
            except PlacementError as error:
                coming.fail(error)
                return
            self._succession.take_over(coming, self._kept)
            if coming.error is None and session is not None and not coming.copies_kv:
                session.valid = 0

    def _take_over_at_rest(self) -> None:
        """The same where no run goes on: a fault is mended for the next one."""
        if self._succession.staged is None or not self.working.acquire(blocking=False):
            return  # whoever works looks once more behind it
        try:
            self.take_over()
        except DeviceLost as error:
            with contextlib.suppress(DeviceLost, InputError):
                self.mend(error)
        finally:
            self.working.release()

    def _mend_at_rest(self, why: str) -> bool:
        """Look once for a way on after a fault that no run has met; whether it was found, or a run is there for it."""
        if not self.working.acquire(blocking=False):
            return True
        try:
            self._members.heard_s = time.monotonic()
            self.mend(DeviceLost(why), budget_s=_LOOK_S)
        except (DeviceLost, InputError) as error:
            logger.info("not mended yet: %s", error)
            return False
        finally:
            self.working.release()
        return True

    def mend(self, error: DeviceLost, *, budget_s: float | None = None) -> None:
        """Make it possible to go on where the session was, see recovery.py; `budget_s` instead of the policy's.

        Raises:
            DeviceLost: there is no `Recovery`, and nothing can run any more; or there was no way within its budget.
        """
        members = self._members
        if members.lost is not None:
            raise error
        if members.recovery is None:
            members.lost = str(error)
            raise error
        self._progress(error)
        self._succession.give_up(error)
        self._steps.lost()
        members.disturbed = True
        try:
            self.faults.append(recovered(members, self._succession, self.session, error, budget_s))
            del self.faults[:-_KEPT]
        finally:
            members.disturbed = False

    def _progress(self, error: DeviceLost) -> None:
        """Refuse to go on for ever where one fault follows another and no token comes between them.

        Raises:
            DeviceLost: it has been so for the whole budget.
        """
        assert self._members.recovery is not None, "asked for"
        at = (0, 0) if self.session is None else (self.session.number, len(self.session.steps))
        now, (before, since_s, count) = time.monotonic(), self._stuck
        if self.session is None or before != at:
            self._stuck = at, now, 1
        elif now - since_s > self._members.recovery.backoff.budget_s:
            self._stuck = at, now, 1
            raise DeviceLost(f"{count} faults in {now - since_s:.0f} s and no token between them: {error}")
        else:
            self._stuck = at, since_s, count + 1

    def close(self) -> None:
        """Look after the devices no more."""
        if self.returns is not None:
            self.returns.close()
