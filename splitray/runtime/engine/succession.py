"""One epoch after another: the one that runs, the one on its way, and how it is staged and takes over.

It knows no run: whoever moves says which sessions have to be there in the next epoch, and when no device is at work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitray.errors import DeviceLost, InputError
from splitray.placement import Placement, validate
from splitray.runtime.engine.epoch import LOAD_S, Epoch, Kept, Next, stage_orders, switch_orders, the_same_weights
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.next_step import SeenState, WantedState
from splitray.runtime.wire.answers import Staged, Switched
from splitray.topology import Topology

Sessions = Callable[[Next], list[Kept]]
"""From what is on its way to the sessions whose KV it needs."""


class Succession:
    """The epochs of one engine's members: `now` runs, `next` is on its way."""

    def __init__(self, members: Members, first: Epoch, *, spin_s: float) -> None:
        """Nothing runs yet: `stage` and `switch` to the first one."""
        self.now, self.whole = first, first
        """`whole` is what was asked for, over all devices: what to go back to when they are there again."""
        self.next: Next | None = None
        self._members, self._spin_s = members, spin_s
        self._last, self._naming = first.number, threading.Lock()
        self._weights: str | None = None

    def following(self, placement: Placement, topology: Topology) -> Epoch:
        """An epoch with a number of its own."""
        with self._naming:
            self._last += 1
            return self.now.moved(placement, topology, self._last)

    def wanted(self, context_tokens: int, *, keeps_formats: bool = False) -> WantedState:
        """What is to run, and how to place it on some of the devices, see next_step.py.

        `keeps_formats`: a session lives, whose pieces are held as they are.
        """
        recovery, arch = self._members.recovery, self.now.arch
        if recovery is None:
            return WantedState(placement=self.whole.placement, topology=self.whole.topology, place=None)

        def place(left: Topology) -> Placement:
            assert recovery is not None, "seen to above"
            keeping = self.now.placement if keeps_formats else None
            return recovery.placement(arch, left, context_tokens, keeping=keeping)

        return WantedState(placement=self.whole.placement, topology=self.whole.topology, fail_back=recovery.fail_back,
                      place=None if recovery.replan is None else place)  # fmt: skip

    def seen(self, usable: frozenset[str], *, stopped: bool = False, patient: bool = False) -> SeenState:
        """What there is, likewise."""
        moving = self.next is not None and not self.next.done.is_set()
        return SeenState(placement=self.now.placement, topology=self.now.topology, usable=usable, stopped=stopped,
                    patient=patient, moving=moving)  # fmt: skip

    def call_back(self, *, others: bool = False) -> None:
        """Have the devices brought back that are not there any more; with `others` also those never needed so far."""
        starts, needed = self._members.starts, self.now.route.devices
        for device in {*self.whole.topology.devices, *self.now.topology.devices}:
            known = starts.was_there(device.id) or device.id in needed
            if device.id not in self._members.endpoints and (known or others):
                starts.keep(device)

    def ensure(self, epoch: Epoch) -> None:
        """Start the devices of an epoch that are not there."""
        self._members.ensure(epoch.topology.device(d) for d in epoch.route.devices)

    def stage(self, epoch: Epoch, sessions: Sequence[Kept], *, void: frozenset[str] = frozenset()) -> dict[str, Staged]:
        """Let every device of an epoch read what it lacks and copy the KV of sessions; what runs goes on.

        Devices in `void` hold nothing of the epoch that runs now.

        Raises:
            ModelError: devices have different weights, or others than the epochs before.
            DeviceLost: a device is gone.
        """
        orders = stage_orders(epoch, self.now, sessions, self._members.endpoints, void)
        answers = self._members.ask(orders, within_s=LOAD_S)
        self._weights = the_same_weights(answers, self._weights)
        return answers

    def switch(self, epoch: Epoch, sessions: Sequence[Kept], *, anew: bool = False) -> dict[str, Switched]:
        """Let a staged epoch run from now on. Only between segments.

        `anew` opens all connections between devices again.
        """
        before = None if anew or epoch is self.now else self.now
        orders = switch_orders(epoch, before, sessions, self._members.endpoints, spin_s=self._spin_s)
        for device, order in orders.items():
            self._members.order(device, order)
        answers = self._members.replies(set(orders))
        self.now, self._members.ways = epoch, epoch.dials()
        return answers

    def begin(self, placement: Placement, topology: Topology, copies_kv: bool, *, lasting: bool = False) -> Next:
        """Give the next epoch its number; `lasting`: its topology is all that there is to be from then on.

        Raises:
            InputError: the placement does not fit, or another one is on its way.
        """
        validate(placement, self.now.arch, topology)
        if self.next is not None and not self.next.done.is_set():
            raise InputError("migration", expected="one at a time", actual="another one on its way",
                             remedy="wait for it")  # fmt: skip
        self.next = Next(self.following(placement, topology), copies_kv, lasting)
        return self.next

    def prepare(self, coming: Next, sessions: Sessions, ready: Callable[[Epoch], None]) -> None:
        """Stage the next epoch; its events `staged` and `done` tell what comes of it.

        `ready` is called when its devices hold their slices.
        """
        started = time.perf_counter()
        try:
            self.ensure(coming.epoch)
            answers = self._staged(coming, sessions)
            ready(coming.epoch)
            coming.staged_bytes = sum(a.copied_bytes for a in answers.values())
            coming.copy_s = max(a.copy_s for a in answers.values())
            coming.stage_s = time.perf_counter() - started
            coming.staged.set()
        except Exception as error:  # a boundary: whoever waits for it must learn it
            coming.fail(error)

    def _staged(self, coming: Next, sessions: Sessions) -> dict[str, Staged]:
        """Stage, again where a session has ended meanwhile whose KV was to be copied: the slices are there by then."""
        while True:
            with self._naming:
                asked = coming.sessions = sessions(coming)
            try:
                return self.stage(coming.epoch, asked)
            except DeviceLost:
                left = {s.number for s in sessions(coming)}
                if coming.done.is_set() or all(s.number in left for s in asked):
                    raise

    def rewritten(self, session: int, position: int) -> None:
        """What was copied of a session from a position on is not what it has now."""
        with self._naming:
            if self.next is not None:
                self.next.sessions = [
                    replace(s, stop=min(s.stop, position)) if s.number == session else s for s in self.next.sessions
                ]

    @property
    def staged(self) -> Next | None:
        """The epoch that may take over as soon as no device is at work, or None."""
        coming = self.next
        return coming if coming is not None and coming.staged.is_set() and not coming.done.is_set() else None

    def take_over(self, coming: Next, sessions: Sessions) -> None:
        """Let what is staged run. Refused, it fails and what runs goes on.

        Raises:
            DeviceLost: a device is gone.
        """
        started = time.perf_counter()
        behind = {s.number: s.stop for s in coming.sessions}
        tails = [replace(s, start=behind.get(s.number, 0)) for s in sessions(coming)]
        try:
            answers = self.switch(coming.epoch, tails)
        except InputError as error:
            coming.fail(error)
            return
        except RuntimeError as error:  # a device is gone, or has failed
            coming.fail(error)
            raise
        if coming.lasting or {*coming.epoch.topology.ids} >= {*self.whole.topology.ids}:
            self.whole = coming.epoch
        coming.tail_bytes = sum(a.copied_bytes for a in answers.values())
        coming.pause_s = time.perf_counter() - started
        coming.done.set()

    def give_up(self, error: Exception) -> None:
        """A fault forgets what is on its way."""
        if self.next is not None and not self.next.done.is_set():
            self.next.fail(error)
