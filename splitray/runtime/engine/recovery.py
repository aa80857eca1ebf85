"""What the engine does when a device is gone or silent: bring it back or do without it, and go on at the same token.

Every fault is treated alike. Who still lives stops where it is; who is dead is started anew beside this; as soon as any
placement fits on those that are there (`next_step`), it is loaded. Each piece of KV comes from a living holder, else
from a checkpoint; the positions that nobody has are read again from their tokens, all at once. In float32 the tokens
are those of a run without a fault.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from splitray.errors import DeviceFailed, DeviceLost, InputError
from splitray.runtime.engine.asking import Unanswered
from splitray.runtime.engine.epoch import LOAD_S, Epoch, Kept
from splitray.runtime.engine.heirs import refuse_new_formats
from splitray.runtime.engine.members import Members, reach_orders
from splitray.runtime.engine.next_step import NextStep, next_step
from splitray.runtime.engine.policy import Recovery, without
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.succession import Succession
from splitray.runtime.wire.messages import AbortOrder, Order, PingOrder, ReadyOrder

__all__ = ["Fault", "Recovery", "make_ready", "recovered", "without"]
A = TypeVar("A")
_PROBE_S = 0.25
_STOP_S = 30.0  # a weak device may have seconds of a prompt to finish


@dataclass(slots=True, kw_only=True)
class Fault:
    """One fault as it was met."""

    reason: str
    restarted: tuple[str, ...] = ()
    """Devices that came up anew while the run waited, and take part."""
    left_out: tuple[str, ...] = ()
    """Devices that the run goes on without."""
    restart_s: float = 0.0
    """Waiting for devices to be there."""
    load_s: float = 0.0
    """Reading slices and copying KV."""
    recovery_s: float = 0.0
    """From the last sign of the run before the fault until it can go on."""
    replayed: int = 0
    """Positions that were read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """Who is there, and with what, once everything that lives has stopped."""

    gone: tuple[str, ...]
    """Dead."""
    silent: tuple[str, ...]
    """Alive, and not reached by us or by a device that needs them."""
    blank: tuple[str, ...]
    """Usable, and without anything of the epoch that ran."""
    reached: int | None
    """The position up to which all others hold the session's KV (a copy that nobody waits for may be behind); None
    where nobody has any."""
    usable: frozenset[str]
    """Who can take part now."""


def recovered(
    members: Members, succession: Succession, session: Session | None, error: DeviceLost, budget_s: float | None = None
) -> Fault:
    """Make an engine able to go on with a session; `budget_s` instead of the policy's.

    Raises:
        DeviceLost: within the budget there was no way; says what is missing.
    """
    recovery, starts = members.recovery, members.starts
    assert recovery is not None, "asked for"
    began, heard_s, fault, why = time.monotonic(), members.heard_s, Fault(reason=str(error)), str(error)
    route = {str(d) for d in succession.now.route.devices}
    gone, refused = set[str](), set[str]()
    starts.hurry()
    for wait_s in recovery.backoff.waits(budget_s=budget_s):
        changes, late = starts.changes, time.monotonic() - began > recovery.patience_s
        found = _roll_call(members, succession.now, None if session is None else session.number)
        gone |= {*found.gone}
        away = route - found.usable
        patient = not late and bool(away) and away <= {*found.silent}
        usable = found.usable if recovery.replan is None else found.usable - refused
        step = next_step(
            succession.wanted(0 if session is None else session.capacity, keeps_formats=session is not None),
            succession.seen(usable, stopped=True, patient=patient),
        )
        if recovery.fail_back or step.kind == "wait":
            succession.call_back(others=step.kind == "wait" and not patient)
        if step.kind == "go_on":
            try:
                _rebuild(members, succession, session, fault, found, step)
            except (InputError, DeviceFailed) as no:
                why = str(no)
                refused |= {*no.devices}
                members.warn_once(why)
                if recovery.replan is None and no.devices and late:
                    break  # it has to take part, and cannot
            except DeviceLost as again:
                why = str(again)
            else:
                _settle(members, succession, fault, route, gone, found)
                fault.recovery_s = time.monotonic() - heard_s
                return fault
        else:
            why = "; ".join([step.why, *(starts.failures[d] for d in sorted(route) if d in starts.failures)])
            if not patient and _in_vain(members, away, found):
                break
        if members.lost is not None:
            raise DeviceLost(members.lost)
        paused = time.monotonic()
        starts.wait(changes, wait_s)
        fault.restart_s += time.monotonic() - paused
    raise DeviceLost(f"{fault.reason}; no way to go on in {time.monotonic() - began:.1f} s: {why}")


def _settle(
    members: Members, succession: Succession, fault: Fault, route: set[str], gone: set[str], found: RollCall
) -> None:
    """Note who takes part now, and have those brought back that were silent and are left out."""
    now = succession.now
    fault.restarted = tuple(sorted(d for d in gone if d in now.route.devices))
    fault.left_out = tuple(sorted(route - {str(d) for d in now.topology.ids}))
    for device in {*fault.left_out} & {*found.silent}:
        members.lose(succession.whole.topology, device)


def _in_vain(members: Members, away: set[str], found: RollCall) -> bool:
    """Whether nobody who is waited for may be started anew within the budget."""
    recovery, starts = members.recovery, members.starts
    assert recovery is not None, "asked for"
    needed = away - {*found.silent} if recovery.replan is None else {*starts.absent}
    worn_out = [starts.worn_out_s(d) > recovery.backoff.budget_s for d in needed]
    if recovery.replan is None:
        return any(worn_out)
    return bool(worn_out) and all(worn_out) and not found.silent


def _roll_call(members: Members, now: Epoch, session: int | None) -> RollCall:
    """Stop what still runs, and see who is left."""
    gone = tuple(members.dead())
    for device in gone:
        members.leave(device)
    there, silent = members.endpoints, dict[str, str]()

    def asked(orders: Mapping[str, Order[A]], within_s: float) -> dict[str, A]:
        try:
            return members.ask(orders, within_s=within_s)
        except Unanswered as error:
            silent.update(error.silent)
            return error.answers

    living = asked(dict.fromkeys(there, PingOrder()), _PROBE_S)
    stopped = asked(dict.fromkeys(living, AbortOrder(epoch=now.number)), _STOP_S)
    members.cut_off(living)
    reaches = reach_orders(now.dials(), {d: there[d] for d in stopped}, _PROBE_S)
    for device, answer in asked(reaches, _PROBE_S * (len(now.route.devices) + 2)).items():
        for peer in answer.peers:  # the origin stays: the tokens go there
            silent[device if peer == now.topology.origin else peer] = "its link is down"
    usable = frozenset(stopped.keys() - silent.keys())
    held = {d: a for d, a in stopped.items() if d in usable and a.epoch == now.number}
    reached = [a.positions.get(session, 0) for d, a in held.items() if session is not None and d in now.route.devices]
    return RollCall(
        gone=gone, silent=tuple(silent), usable=usable, blank=tuple(usable - held.keys()),
        reached=min(reached, default=None),
    )  # fmt: skip


def _rebuild(
    members: Members, succession: Succession, session: Session | None, fault: Fault, found: RollCall, step: NextStep
) -> None:
    """Stage and switch, on the same placement or on another one."""
    recovery, began = members.recovery, time.monotonic()
    assert recovery is not None, "asked for"
    if session is not None and session.steps:
        refuse_new_formats(succession.now.placement, step.placement, succession.now.arch)
    epoch = succession.following(step.placement, step.topology)
    for device in epoch.route.devices:
        members.reach(device)
    void = {str(d) for d in succession.now.topology.ids} - (found.usable - {*found.blank})
    kept = []
    if session is not None and session.steps:
        stop = session.positions if found.reached is None else min(session.positions, found.reached)
        saved = session.saved[-1].stop if session.saved else 0
        if stop < saved:  # the devices were reading again what the store has
            stop, void = saved, void | found.usable
        kept = [Kept(number=session.number, capacity=session.capacity, stop=stop, files=tuple(session.saved),
                     store=recovery.store)]  # fmt: skip
    answers = succession.stage(epoch, kept, void=frozenset(void))
    fault.load_s += time.monotonic() - began
    succession.switch(epoch, [], anew=True)
    if session is not None:
        session.valid = min((a.valid.get(session.number, 0) for a in answers.values()), default=0) if kept else 0
        session.saved = [f for f in session.saved if f.stop <= session.valid]  # what is damaged is saved again
        fault.replayed += max(0, session.positions - session.valid)


def make_ready(members: Members, now: Epoch) -> None:
    """Let the others hold what they need in an epoch if a device of `Recovery.stand_by` is lost."""
    recovery = members.recovery
    if recovery is None or recovery.replan is None:
        return
    for device in recovery.stand_by:
        if device in now.route.devices:
            left = without(now.topology, [device])
            then = now.moved(
                recovery.placement(now.arch, left, now.arch.context_tokens, keeping=now.placement), left, -1
            )
            members.ensure(then.topology.device(d) for d in then.route.devices)
            lenders = {d: then.lenders(d, members.endpoints) for d in then.route.devices}
            orders = {str(d): ReadyOrder(assignment=then.assignment(d), lenders=lenders[d]) for d in then.route.devices}
            members.ask(orders, within_s=LOAD_S)
