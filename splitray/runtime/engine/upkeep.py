"""What changes under an engine while no device is at work: a staged placement takes over, or a fault is mended.

That is between two segments of a run, or while there is none. It decides no placement.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from splitray.errors import DeviceLost, InputError
from splitray.placement import Placement
from splitray.runtime.engine.epoch import Kept, Next
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.recovery import Fault, recovered
from splitray.runtime.engine.returns import Returns
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.stepping import Steps
from splitray.runtime.engine.succession import Succession
from splitray.topology import Topology


class Upkeep:
    """Lets the placement and the devices of one engine change without harm to the sessions on them."""

    def __init__(self, members: Members, succession: Succession, steps: Steps) -> None:
        """All is well, and nothing runs."""
        self.session: Session | None = None
        """The run that goes on, or None."""
        self.faults: list[Fault] = []
        """Those that were mended."""
        self.working = threading.Lock()
        """Held while the devices are at work: one run, step or question at a time."""
        self._members, self._succession, self._steps = members, succession, steps
        self._returns = Returns(members, succession, lambda e: self.migrate(e.placement, e.topology, copies_kv=True))

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

    def migrate(self, placement: Placement, topology: Topology, *, copies_kv: bool) -> Next:
        """See `Engine.migrate`."""
        coming = self._succession.begin(placement, topology, copies_kv)

        def prepare() -> None:
            self._succession.prepare(coming, self._kept)
            self._take_over_at_rest()  # if there is no run, nobody else does

        threading.Thread(target=prepare, name="splitray-stage", daemon=True).start()
        return coming

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

    def mend(self, error: DeviceLost) -> None:
        """Make it possible to go on where the session was, see recovery.py.

        Raises:
            DeviceLost: there is no `Recovery`, or no way; nothing can run any more.
        """
        members = self._members
        try:
            if members.recovery is None or members.lost is not None:
                raise error
            self._succession.give_up(error)
            self._steps.lost()
            members.disturbed = True
            with self._succession.starting:
                fault = recovered(members, self._succession, self.session, error)
                self.faults.append(fault)
                if fault.left_out and members.recovery.fail_back:
                    self._returns.wait_for(fault.left_out)
        except DeviceLost as last:
            members.lost = members.lost or str(last)
            raise
        finally:
            members.disturbed = False

    def close(self) -> None:
        """Bring nobody back any more: waits for what is being started just now, that must not outlive the engine."""
        self._returns.close()
