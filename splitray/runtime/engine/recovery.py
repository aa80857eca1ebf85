"""What the engine does when a device is gone or silent: bring it back or do without it, and go on at the same token.

Every fault is treated alike. Who still lives stops where it is; who is dead is started anew, and who cannot be is left
out by another placement; each piece of KV comes from a living holder, else from a checkpoint; the positions that nobody
has are read again from their tokens, all at once. In float32 the tokens are those of a run without a fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from splitray.arch import ModelArch
from splitray.errors import DeviceLost, InputError
from splitray.placement import Placement, validate
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState, Planner
from splitray.runtime.engine.asking import Unanswered
from splitray.runtime.engine.backoff import Backoff
from splitray.runtime.engine.epoch import LOAD_S, Kept, astuple
from splitray.topology import Topology

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine
    from splitray.runtime.engine.session import Session

_PROBE_S = 0.25
_STOP_S = 30.0  # a weak device may have seconds of a prompt to finish

Replan = Callable[[Topology, int], Placement]
"""From the devices that are left and the tokens of context to a placement."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What may be done.

    Args:
        store: URL or folder of checkpoints that all devices reach; without one, lost KV is computed from the tokens.
        every_tokens: between checkpoints; by default Young's period for `failures_per_s` and the measured cost.
        restarts: how often each device may be started anew, in `restarts_within_s`.
        replan: a planner (a name or an object), or a function that gives the placement that does without lost devices.
            It is tried before they are started anew; None: there is to be none.
        stand_by: devices for whose loss the others hold the slices ready that `replan` gives them then.
        fail_back: whether a device that was left out is started anew, and what it held goes back to it.
        patience_s: how long a device that lives but is not reached is waited for before it is left out.
        stall_s: without a token after which devices are asked whether they live.
        backoff: when to look again.
    """

    store: str | None = None
    every_tokens: int | None = None
    failures_per_s: float = 1 / 3600
    restarts: int = 3
    restarts_within_s: float = 600.0
    replan: str | Planner | Replan | None = None
    stand_by: tuple[str, ...] = ()
    fail_back: bool = True
    patience_s: float = 5.0
    stall_s: float = 0.5
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if isinstance(self.replan, str):
            make_planner(self.replan)  # a wrong name is refused now, and not when a device is lost

    def placement(self, arch: ModelArch, topology: Topology, context_tokens: int) -> Placement:
        """What `replan` says.

        Raises:
            InputError: nothing fits.
        """
        assert self.replan is not None, "asked for"
        if isinstance(self.replan, str) or hasattr(self.replan, "propose"):
            state = ClusterState(arch=arch, topology=topology, context_tokens=context_tokens)
            return make_planner(self.replan).propose(state)
        placement = self.replan(topology, context_tokens)
        validate(placement, arch, topology)
        return placement


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


def recovered(engine: Engine, session: Session | None, error: DeviceLost) -> Fault:
    """Make the engine able to go on with a session.

    Raises:
        DeviceLost: within the budget there was no way; says what is missing.
    """
    recovery = engine.recovery
    assert recovery is not None, "asked for"
    began, fault, last = time.monotonic(), Fault(reason=str(error)), str(error)
    for wait_s in recovery.backoff.waits():
        looked = time.monotonic()
        gone = [d for d in engine.fleet.dead() if d in engine.members.endpoints]
        living = [d for d in engine.members.endpoints if d not in gone]
        silent, void, reached = _settled(engine, living, None if session is None else session.number)
        out = [*gone, *silent]
        late = time.monotonic() - began > recovery.patience_s
        do_without = recovery.replan is not None and (bool(gone) or late)
        try:
            if do_without or not set(out) & set(engine.route.devices):
                _rebuild(engine, session, fault, out=out, void=frozenset({*void, *out}), reached=reached)
                fault.recovery_s = time.monotonic() - began
                engine.faults.append(fault)
                if fault.left_out and recovery.fail_back:
                    engine.await_return(fault.left_out)
                return fault
            last = f"{', '.join(out)} cannot be reached"
        except DeviceLost as again:
            last = str(again)
        left = _restarted(engine, gone, fault)
        if gone and not left:
            continue
        if left and recovery.replan is None:
            break
        time.sleep(max(0.0, wait_s - (time.monotonic() - looked)))
    raise DeviceLost(f"{fault.reason}; no way to go on in {time.monotonic() - began:.1f} s: {last}")


def _restarted(engine: Engine, gone: list[str], fault: Fault) -> list[str]:
    """Start dead devices anew; gives those that cannot be."""
    began, left = time.monotonic(), []
    for device in gone:
        try:
            engine.members.restart(device)
            fault.restarted = (*fault.restarted, device)
        except DeviceLost:
            left.append(device)
    fault.restart_s += time.monotonic() - began
    return left


def _settled(engine: Engine, living: list[str], session: int | None) -> tuple[list[str], list[str], int | None]:
    """Stop what still runs.

    Returns:
        Who is not reached; who answers but holds nothing of this epoch; the position up to which all others hold the
        session's KV (a copy that nobody waits for may be behind), None where nobody has any.
    """
    silent: dict[str, str] = {}
    answers: dict[str, dict[str, Any]] = {}

    def asked(device: str, op: str, order: dict[str, Any], within_s: float) -> None:
        try:
            answers.update(engine.members.ask({device: (op, order)}, within_s=within_s))
        except Unanswered as error:
            answers.pop(device, None)
            silent.update(error.silent)

    for device in living:
        asked(device, "ping", {}, _PROBE_S)
    for device in list(answers):
        asked(device, "abort", {"epoch": engine.epoch}, _STOP_S)
    pairs = [(a, b) for a, b in engine.now.dials() if a in answers and b in answers]
    stopped = dict(answers)
    for device in stopped:
        peers = {b: astuple(engine.members.endpoints[b]) for a, b in pairs if a == device}
        if peers:
            asked(device, "reach", {"peers": peers, "within_s": _PROBE_S}, _PROBE_S * (len(peers) + 2))
            silent |= {
                _far(engine, device, p): "its link is down" for p in answers.get(device, {}).get("unreached", ())
            }
    void = [d for d, a in stopped.items() if a["epoch"] != engine.epoch]
    reached = [a["positions"][session] for d, a in stopped.items() if d not in void and session in a["positions"]]
    return list(silent), void, min(reached, default=None)


def _far(engine: Engine, a: str, b: str) -> str:
    """Which of two that do not reach each other is left out: not the origin, where the tokens go."""
    return a if b == engine.topology.origin else b


def _rebuild(
    engine: Engine, session: Session | None, fault: Fault, *, out: list[str], void: frozenset[str], reached: int | None
) -> None:
    """Stage and switch, on the same placement or on another one without `out`."""
    recovery, began = engine.recovery, time.monotonic()
    assert recovery is not None, "asked for"
    placement, topology = engine.placement, engine.topology
    needed = [d for d in out if d in engine.route.devices]
    if needed:
        topology = without(topology, out)
        context = session.capacity if session is not None else 0
        try:
            placement = recovery.placement(engine.arch, topology, context)
        except InputError as error:
            raise DeviceLost(f"without {', '.join(out)} there is no placement: {error}") from error
    epoch = engine.succession.following(placement, topology)
    engine.succession.ensure(epoch)
    for device in epoch.route.devices:
        engine.members.dial(device)
    kept = [] if session is None or not session.steps else [
        Kept(number=session.number, capacity=session.capacity,
             stop=session.positions if reached is None else min(session.positions, reached), files=tuple(session.saved),
             store=recovery.store)
    ]  # fmt: skip
    answers = engine.succession.stage(epoch, kept, void=void)
    fault.load_s += time.monotonic() - began
    engine.succession.switch(epoch, [], anew=True)
    if needed:
        fault.left_out = (*fault.left_out, *needed)
        for lost in needed:
            engine.members.leave(lost)
    if session is not None:
        session.valid = min((a["valid"].get(session.number, 0) for a in answers.values()), default=0) if kept else 0
        session.saved = [f for f in session.saved if f.stop <= session.valid]  # what is damaged is saved again
        fault.replayed += max(0, session.positions - session.valid)


def make_ready(engine: Engine) -> None:
    """Let the others hold what they need if a device of `Recovery.stand_by` is lost."""
    recovery = engine.recovery
    if recovery is None or recovery.replan is None:
        return
    for device in recovery.stand_by:
        if device in engine.route.devices:
            left = without(engine.topology, [device])
            then = engine.now.moved(recovery.placement(engine.arch, left, engine.arch.context_tokens), left, -1)
            engine.succession.ensure(then)
            lenders = {d: then.lenders(d, engine.members.endpoints) for d in then.route.devices}
            orders = {
                str(d): ("ready", {"load": then.load_order(d).to_plain(), "lenders": lenders[d]})
                for d in then.route.devices
            }
            engine.members.ask(orders, within_s=LOAD_S)


def without(topology: Topology, out: list[str]) -> Topology:
    """The devices that are left.

    Raises:
        DeviceLost: none are, or the origin that holds pinned pieces is gone.
    """
    left = tuple(d for d in topology.devices if d.id not in out)
    if not left:
        raise DeviceLost("no device is left")
    origin = topology.origin
    if origin in out:
        if topology.origin_holds != "none":
            raise DeviceLost(f"{origin} is gone, and by origin_holds its pieces may be nowhere else")
        origin = left[0].id
    links = tuple(x for x in topology.links if x.source not in out and x.target not in out)
    return replace(topology, devices=left, links=links, origin=origin)
