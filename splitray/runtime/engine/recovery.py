"""What the engine does when a device is gone or silent: bring it back or do without it, and go on at the same token.

Every fault is treated alike. Who still lives stops where it is; who is dead is started anew, and who cannot be is left
out by another placement; each piece of KV comes from a living holder, else from a checkpoint; the positions that nobody
has are read again from their tokens, all at once. In float32 the tokens are those of a run without a fault.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

from splitray.errors import DeviceLost, InputError
from splitray.runtime.engine.asking import Unanswered
from splitray.runtime.engine.epoch import LOAD_S, Epoch, Kept
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.policy import without
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.succession import Succession
from splitray.runtime.wire.answers import Stopped
from splitray.runtime.wire.messages import AbortOrder, Order, PingOrder, ReachOrder, ReadyOrder

A = TypeVar("A")
_PROBE_S = 0.25
_STOP_S = 30.0  # a weak device may have seconds of a prompt to finish


@dataclass(slots=True, kw_only=True)
class Fault:
    """One fault as it was met. Times are from its detection; `replayed` positions were read again."""

    reason: str
    restarted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    restart_s: float = 0.0
    load_s: float = 0.0
    recovery_s: float = 0.0
    replayed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """Who is there, and with what, once everything that lives has stopped."""

    gone: tuple[str, ...]
    """Dead."""
    silent: tuple[str, ...]
    """Alive, and not reached by us or by a device that needs them."""
    blank: tuple[str, ...]
    """Reached, and without anything of the epoch that ran."""
    reached: int | None
    """The position up to which all others hold the session's KV (a copy that nobody waits for may be behind); None
    where nobody has any."""

    @property
    def out(self) -> tuple[str, ...]:
        """Who cannot take part now."""
        return (*self.gone, *self.silent)


def recovered(members: Members, succession: Succession, session: Session | None, error: DeviceLost) -> Fault:
    """Make an engine able to go on with a session.

    Raises:
        DeviceLost: within the budget there was no way; says what is missing.
    """
    recovery = members.recovery
    assert recovery is not None, "asked for"
    began, fault, last = time.monotonic(), Fault(reason=str(error)), str(error)
    for wait_s in recovery.backoff.waits():
        looked = time.monotonic()
        found = _roll_call(members, succession.now, None if session is None else session.number)
        late = time.monotonic() - began > recovery.patience_s
        do_without = recovery.replan is not None and (bool(found.gone) or late)
        try:
            if do_without or not set(found.out) & set(succession.now.route.devices):
                _rebuild(members, succession, session, fault, found)
                fault.recovery_s = time.monotonic() - began
                return fault
            last = f"{', '.join(found.out)} cannot be reached"
        except DeviceLost as again:
            last = str(again)
        left = _restarted(members, found.gone, fault)
        if found.gone and not left:
            continue
        if left and recovery.replan is None:
            break
        time.sleep(max(0.0, wait_s - (time.monotonic() - looked)))
    raise DeviceLost(f"{fault.reason}; no way to go on in {time.monotonic() - began:.1f} s: {last}")


def _restarted(members: Members, gone: tuple[str, ...], fault: Fault) -> list[str]:
    """Start dead devices anew; gives those that cannot be."""
    began, left = time.monotonic(), []
    for device in gone:
        try:
            members.restart(device)
            fault.restarted = (*fault.restarted, device)
        except DeviceLost:
            left.append(device)
    fault.restart_s += time.monotonic() - began
    return left


def _roll_call(members: Members, now: Epoch, session: int | None) -> RollCall:
    """Stop what still runs, and see who is left."""
    gone = tuple(d for d in members.fleet.dead() if d in members.endpoints)
    silent: dict[str, str] = {}

    def asked(device: str, order: Order[A], within_s: float) -> dict[str, A]:
        try:
            return members.ask({device: order}, within_s=within_s)
        except Unanswered as error:
            silent.update(error.silent)
            return {}

    stopped: dict[str, Stopped] = {}
    living = [d for d in members.endpoints if d not in gone and asked(d, PingOrder(), _PROBE_S)]
    for device in living:
        stopped |= asked(device, AbortOrder(epoch=now.number), _STOP_S)
    pairs = [(a, b) for a, b in now.dials() if a in stopped and b in stopped]
    for device in stopped:
        peers = {b: members.endpoints[b] for a, b in pairs if a == device}
        if peers:
            order = ReachOrder(peers=peers, within_s=_PROBE_S)
            for answer in asked(device, order, _PROBE_S * (len(peers) + 2)).values():
                for peer in answer.peers:  # the origin stays: the tokens go there
                    silent[device if peer == now.topology.origin else peer] = "its link is down"
    blank = tuple(d for d, a in stopped.items() if a.epoch != now.number)
    reached = [a.positions[session] for d, a in stopped.items() if d not in blank and session in a.positions]
    return RollCall(gone=gone, silent=tuple(silent), blank=blank, reached=min(reached, default=None))


def _rebuild(members: Members, succession: Succession, session: Session | None, fault: Fault, found: RollCall) -> None:
    """Stage and switch, on the same placement or on another one without those that are out."""
    recovery, now, began = members.recovery, succession.now, time.monotonic()
    assert recovery is not None, "asked for"
    placement, topology = now.placement, now.topology
    needed = [d for d in found.out if d in now.route.devices]
    if needed:
        topology = without(topology, found.out)
        context = session.capacity if session is not None else 0
        try:
            placement = recovery.placement(now.arch, topology, context)
        except InputError as error:
            raise DeviceLost(f"without {', '.join(found.out)} there is no placement: {error}") from error
    epoch = succession.following(placement, topology)
    succession.ensure(epoch)
    for device in epoch.route.devices:
        members.dial(device)
    kept = []
    if session is not None and session.steps:
        stop = session.positions if found.reached is None else min(session.positions, found.reached)
        kept = [Kept(number=session.number, capacity=session.capacity, stop=stop, files=tuple(session.saved),
                     store=recovery.store)]  # fmt: skip
    answers = succession.stage(epoch, kept, void=frozenset({*found.blank, *found.out}))
    fault.load_s += time.monotonic() - began
    succession.switch(epoch, [], anew=True)
    fault.left_out = (*fault.left_out, *needed)
    for lost in needed:
        members.leave(lost)
    if session is not None:
        session.valid = min((a.valid.get(session.number, 0) for a in answers.values()), default=0) if kept else 0
        session.saved = [f for f in session.saved if f.stop <= session.valid]  # what is damaged is saved again
        fault.replayed += max(0, session.positions - session.valid)


def make_ready(members: Members, succession: Succession) -> None:
    """Let the others hold what they need if a device of `Recovery.stand_by` is lost."""
    recovery, now = members.recovery, succession.now
    if recovery is None or recovery.replan is None:
        return
    for device in recovery.stand_by:
        if device in now.route.devices:
            left = without(now.topology, [device])
            then = now.moved(recovery.placement(now.arch, left, now.arch.context_tokens), left, -1)
            succession.ensure(then)
            lenders = {d: then.lenders(d, members.endpoints) for d in then.route.devices}
            orders = {str(d): ReadyOrder(assignment=then.assignment(d), lenders=lenders[d]) for d in then.route.devices}
            members.ask(orders, within_s=LOAD_S)
