"""Which placement should run: asks a planner as the cluster changes, and moves only where it pays.

`next_action` is pure: from what is wanted and what is observed to what is done. The thread around it looks every N
tokens and at once after an event; staging and switching are the engine's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.migration import delay_s, diff
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState, Planner
from splitray.runtime.engine.monitor import Monitor
from splitray.topology import Topology

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine

logger = logging.getLogger(__name__)
_KEPT = 1000  # decisions that are remembered
_PAUSE_STEPS = 2.0  # decode steps that a switch may cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What a planner wants, and its price on the links as they are."""

    placement: Placement
    tpot_s: float
    copy_s: float = 0.0
    """Copying the run's KV, beside the run."""
    read_s: float = float("inf")
    """Reading the run's tokens again, while it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What runs: its price on the same links, and the tokens that are still to come."""

    placement: Placement
    tpot_s: float
    tokens_left: int
    moving: bool
    allowed_s: float = float("inf")
    """What moves may still cost, see `Gate.share`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """When a move is worth it.

    Args:
        gain: of a token's time, below which nothing moves: predictions are not better.
        pays: how many times over the tokens to come must pay for the move.
        share: of all time that moves may cost, so that a link which flips faster than moves pay cannot cost more.
        first_s: what they may cost before any time has passed.
        most_s: what they may save up.
    """

    gain: float = 0.05
    pays: float = 1.5
    share: float = 0.05
    first_s: float = 2.0
    most_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Action:
    """To stay, or to move; and why."""

    kind: Literal["stay", "move"]
    why: str
    copies_kv: bool = True
    cost_s: float = 0.0


def next_action(desired: Desired, observed: Observed, gate: Gate) -> Action:
    """What to do.

    A placement that cannot run any more (its time is infinite: a link is gone) is left whatever the gate says.
    """
    if observed.moving:
        return Action("stay", "a move is under way")
    if desired.placement == observed.placement:
        return Action("stay", "nothing better is known")
    if desired.tpot_s == float("inf"):
        return Action("stay", "what is wanted cannot run either")
    if observed.tpot_s == float("inf"):
        return Action("move", "what runs cannot go on", copies_kv=False)
    saved_s = observed.tpot_s - desired.tpot_s
    if saved_s < gate.gain * observed.tpot_s:
        return Action("stay", f"gains {saved_s / observed.tpot_s:.0%} a token, less than {gate.gain:.0%}")
    # While KV is copied the run goes on at the old pace.
    copy_s = desired.copy_s * saved_s / observed.tpot_s
    cost_s = min(copy_s, desired.read_s) + _PAUSE_STEPS * desired.tpot_s
    if saved_s * observed.tokens_left < gate.pays * cost_s:
        return Action("stay", f"{observed.tokens_left} tokens do not pay for {cost_s:.2f} s")
    if cost_s > observed.allowed_s:
        return Action("stay", f"moves may cost {observed.allowed_s:.2f} s now, this one {cost_s:.2f} s")
    gains = f"gains {saved_s / observed.tpot_s:.0%} a token for {cost_s:.2f} s"
    return Action("move", gains, copies_kv=copy_s <= desired.read_s, cost_s=cost_s)


class _Prices:
    """Prices of placements in one state of the cluster; infinite where a link is missing."""

    def __init__(self, state: ClusterState) -> None:
        self._model = CostModel(state.arch, state.topology, codec=state.codec)

    def tpot_s(self, placement: Placement, context: int) -> float:
        try:
            return self._model.tpot_s(placement, context_tokens=max(1, context))
        except InputError:
            return float("inf")

    def read_s(self, placement: Placement, tokens: int) -> float:
        try:
            return self._model.ttft_s(placement, prompt_tokens=tokens) if tokens else 0.0
        except InputError:
            return float("inf")


def weighed(
    planner: Planner, state: ClusterState, *, tokens_left: int, moving: bool, allowed_s: float
) -> tuple[Desired, Observed]:
    """Both sides of a decision: what a planner wants, and what runs (`state.current`)."""
    assert state.current is not None, "something runs"
    wanted, cached, prices = planner.propose(state), state.cached_tokens or 0, _Prices(state)
    desired = Desired(
        placement=wanted,
        tpot_s=prices.tpot_s(wanted, cached),
        copy_s=delay_s(diff(state.current, wanted, state.arch, cached), state.topology, staged=True),
        read_s=prices.read_s(wanted, cached),
    )
    return desired, Observed(
        placement=state.current, tpot_s=prices.tpot_s(state.current, cached), tokens_left=tokens_left, moving=moving,
        allowed_s=allowed_s,
    )  # fmt: skip


@dataclass
class Allowance:
    """What moves may cost: grows with time, see `Gate`."""

    gate: Gate
    at_s: float
    left_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.left_s = self.gate.first_s

    def at(self, now_s: float) -> float:
        """Seconds that moves may cost by now."""
        self.left_s = min(self.gate.most_s, self.left_s + self.gate.share * (now_s - self.at_s))
        self.at_s = now_s
        return self.left_s


@dataclass(slots=True, kw_only=True)
class Decision:
    """One look: what was wanted, what was done, and how it came out."""

    action: Action
    predicted_tpot_s: float
    current_tpot_s: float
    at_token: int


@dataclass
class Controller:
    """Looks at the cluster and moves the engine's placement.

    Args:
        engine: with a `Recovery`.
        planner: proposes placements.
        topology: gives the cluster as it is now, links measured (`Monitor.topology`).
        every_tokens: between looks.
        change: of a link, or of a device's speed or memory, since the last look after which it looks at once.
        gate: when a move is worth it.
        tokens_at_rest: for which a placement is chosen while nothing runs.
        monitor: starts and ends with it.
    """

    engine: Engine
    planner: Planner
    topology: Callable[[], Topology]
    every_tokens: int = 4
    change: float = 0.3
    gate: Gate = field(default_factory=Gate)
    tokens_at_rest: int = 64
    monitor: Monitor | None = None
    decisions: list[Decision] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _allowance: Allowance = field(init=False)
    _looked: tuple[int, Topology | None] = (0, None)

    def __post_init__(self) -> None:
        """Start the allowance of moves from now."""
        self._allowance = Allowance(self.gate, time.monotonic())

    def start(self) -> None:
        """Look in a thread of its own until `close`."""
        if self.monitor is not None:
            self.monitor.start()
        self._thread = threading.Thread(target=self._run, name="splitray-controller", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.monitor is not None:
            self.monitor.close()

    def _run(self) -> None:
        while not self._stop.wait(0.02) and self.engine.lost is None:
            try:
                now, tokens = self.topology(), self.engine.tokens
                if self._due(now, tokens):
                    self.look(now)
            except (InputError, OSError, RuntimeError) as error:  # a device that is gone is the recovery's business
                logger.info("no look this time: %s", error)

    def _due(self, now: Topology, tokens: int) -> bool:
        at, before = self._looked
        if tokens - at >= self.every_tokens or before is None:
            return True
        then, seen = _figures(before), _figures(now)
        return then.keys() != seen.keys() or any(abs(seen[k] - v) > self.change * v for k, v in then.items())

    def look(self, now: Topology) -> Decision:
        """One decision, carried out."""
        engine, tokens = self.engine, self.engine.tokens
        self._looked = tokens, now
        session = engine.progress
        cached, left = (session.positions, session.tokens_left) if session is not None else (0, self.tokens_at_rest)
        capacity = engine.arch.context_tokens if session is None else session.capacity
        state = ClusterState(
            arch=engine.arch, topology=now, context_tokens=capacity,
            current=engine.placement, cached_tokens=cached, interval_tokens=max(1, left), codec=engine.now.codec,
        )  # fmt: skip
        coming = engine.next
        desired, observed = weighed(
            self.planner, state, tokens_left=left, moving=coming is not None and not coming.done.is_set(),
            allowed_s=self._allowance.at(time.monotonic()),
        )  # fmt: skip
        action = next_action(desired, observed, self.gate)
        if action.kind == "move":
            self._allowance.left_s -= action.cost_s
            engine.migrate(desired.placement, copies_kv=action.copies_kv)
        decision = Decision(
            action=action, predicted_tpot_s=desired.tpot_s, current_tpot_s=observed.tpot_s, at_token=tokens
        )
        self.decisions.append(decision)
        del self.decisions[:-_KEPT]
        return decision


def _figures(topology: Topology) -> dict[tuple[str, str], float]:
    """What a decision depends on; a device or link that is lost or back changes the keys."""
    figures = {(str(x.source), str(x.target)): x.bandwidth_bytes_per_s for x in topology.links}
    for d in topology.devices:
        figures[d.id, "memory"], figures[d.id, "speed"] = d.memory_bytes, d.memory_bandwidth_bytes_per_s
    return figures


def attend(engine: Engine, planner: str | Planner) -> Controller:
    """Let a planner (a name or an object) move an engine's placement until the controller is closed or the engine is.

    Raises:
        InputError: there is no such planner, or it cannot be used.
    """
    monitor = Monitor(engine)
    controller = Controller(engine=engine, planner=make_planner(planner), topology=monitor.topology, monitor=monitor)
    controller.start()
    return controller
