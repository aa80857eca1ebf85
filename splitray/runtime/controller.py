"""Which placement should run: asks a planner as the cluster changes, and moves only where it pays.

`next_action` is pure: from what is wanted and what is observed to what is done. The thread around it looks every N
tokens and at once after an event; staging and switching are the engine's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.migration import delay_s, diff
from splitray.placement import Placement
from splitray.planners.protocol import ClusterState, Planner
from splitray.topology import Topology

if TYPE_CHECKING:
    from splitray.runtime.engine import Engine

logger = logging.getLogger(__name__)
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
    since_move_tokens: int
    """Tokens since the last switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """When a move is worth it.

    Args:
        gain: of a token, below which nothing moves: predictions are that good.
        pays: how many times over the tokens to come must pay for the move.
        rest_tokens: after a move, before the next one; doubled by every move that takes the last one back.
        most_rest_tokens: to which it doubles.
    """

    gain: float = 0.1
    pays: float = 2.0
    rest_tokens: int = 16
    most_rest_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Action:
    """To stay, or to move; and why."""

    kind: Literal["stay", "move"]
    why: str
    copies_kv: bool = True


def next_action(desired: Desired, observed: Observed, gate: Gate, *, returns: int = 0) -> Action:
    """What to do. `returns` counts moves in a row of which each took the one before back.

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
    rest = min(gate.most_rest_tokens, gate.rest_tokens * 2**returns)
    if observed.since_move_tokens < rest:
        return Action("stay", f"moved {observed.since_move_tokens} tokens ago, rests for {rest}")
    saved_s = observed.tpot_s - desired.tpot_s
    if saved_s < gate.gain * observed.tpot_s:
        return Action("stay", f"gains {saved_s / observed.tpot_s:.0%} a token, less than {gate.gain:.0%}")
    # While KV is copied the run goes on at the old pace.
    copy_s = desired.copy_s * saved_s / observed.tpot_s
    cost_s = min(copy_s, desired.read_s) + _PAUSE_STEPS * desired.tpot_s
    if saved_s * observed.tokens_left < gate.pays * cost_s:
        return Action("stay", f"{observed.tokens_left} tokens do not pay for {cost_s:.2f} s")
    gains = f"gains {saved_s / observed.tpot_s:.0%} a token for {cost_s:.2f} s"
    return Action("move", gains, copies_kv=copy_s <= desired.read_s)


def weighed(planner: Planner, state: ClusterState) -> tuple[Desired, float]:
    """What a planner wants in a state, and a later token's time on what runs (`state.current`)."""
    assert state.current is not None, "something runs"
    wanted, cached, prices = planner.propose(state), state.cached_tokens or 0, _Prices(state)
    desired = Desired(
        placement=wanted,
        tpot_s=prices.tpot_s(wanted, cached),
        copy_s=delay_s(diff(state.current, wanted, state.arch, cached), state.topology, staged=True),
        read_s=prices.read_s(wanted, cached),
    )
    return desired, prices.tpot_s(state.current, cached)


class _Prices:
    """Infinite where a link is missing."""

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


@dataclass(slots=True)
class History:
    """Moves so far, to see that one takes another back."""

    last: tuple[Placement, Placement] | None = None
    returns: int = 0

    def moved(self, before: Placement, after: Placement) -> None:
        """Note a move."""
        back = self.last is not None and self.last == (after, before)
        self.returns = self.returns + 1 if back else 0
        self.last = before, after


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
        change: of a link's rate since the last look after which it looks at once.
        gate: when a move is worth it.
        tokens_at_rest: for which a placement is chosen while nothing runs.
    """

    engine: Engine
    planner: Planner
    topology: Callable[[], Topology]
    every_tokens: int = 16
    change: float = 0.3
    gate: Gate = field(default_factory=Gate)
    tokens_at_rest: int = 64
    decisions: list[Decision] = field(default_factory=list)
    _history: History = field(default_factory=History)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _looked: tuple[int, Topology | None] = (0, None)
    _moved_at: int = 0

    def start(self) -> None:
        """Look in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="splitray-controller", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
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
        rates = {(x.source, x.target): x.bandwidth_bytes_per_s for x in before.links}
        return any(
            abs(x.bandwidth_bytes_per_s - rates.get((x.source, x.target), 0.0))
            > self.change * rates.get((x.source, x.target), 0.0)
            for x in now.links
        )

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
        desired, current_s = weighed(self.planner, state)
        coming = engine.next
        observed = Observed(
            placement=engine.placement, tpot_s=current_s, tokens_left=left,
            moving=coming is not None and not coming.done.is_set(), since_move_tokens=tokens - self._moved_at,
        )  # fmt: skip
        action = next_action(desired, observed, self.gate, returns=self._history.returns)
        if action.kind == "move":
            self._history.moved(engine.placement, desired.placement)
            self._moved_at = tokens
            engine.migrate(desired.placement, copies_kv=action.copies_kv)
        decision = Decision(
            action=action, predicted_tpot_s=desired.tpot_s, current_tpot_s=observed.tpot_s, at_token=tokens
        )
        self.decisions.append(decision)
        return decision
