"""Many instances of one cell, side by side: what a policy is trained and compared on.

A slot: instances decide in a few turns. Whoever has the turn sees this slot's rates and queues, and how many others are
at the cloud as far as that is decided (`sim/crowd.py`); its placement is made (by the exact program, as far as it left
that free), and a move is paid for as `sim/arena.py` does. Then `Simulator` serves the requests of all. Knows no Ray.

Shapes: N instances, G groups, T slots; n rows that have the turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from splitray.arrays import Bools, Floats, Floats32, Ints
from splitray.cost import Rates
from splitray.rl.grid.choice import Choice
from splitray.rl.grid.grid import Grid
from splitray.rl.world.action import DEFAULT_KNOBS, FREE, PRICES, ActionSpec, high_mask, low_mask, modes_that_fit, parts
from splitray.rl.world.cell import CLOUD_DEVICE, Cell, References, references
from splitray.rl.world.deciding import allowed_modes, decided
from splitray.rl.world.knobs import Moment, planned
from splitray.rl.world.moving import way_s
from splitray.rl.world.observation import History, Seen, Static, observe
from splitray.rl.world.reward import Spent, Weights, rewards_of, terms_of
from splitray.rl.world.room import room_of
from splitray.rl.world.rows import Rows
from splitray.rl.world.weather import Climate, Weather, copied, draw, users_of
from splitray.sim.crowd import Crowd, delay_to_others, slowed
from splitray.sim.simulator import Simulator

SLOT_S = 1.0
TURNS = 4  # of a slot
_SHARED = np.array([False, True])  # an edge device is nobody else's
_STILL = ("flops_per_s", "bytes_per_s", "launch_s", "exchange_s", "contention_s_per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One slot: rewards in two parts [N, 2], their terms [N] each, and what was moved.

    `mattered`: whether another choice would have led elsewhere, as far as that was asked for, [N]. `cloud_used`: the
    share of the cloud's time that each line took, [N]; those of a pool add up to 1 at most.
    """

    rewards: Floats
    terms: dict[str, Floats]
    moved: Bools
    mattered: Bools
    cloud_used: Floats
    choice: Choice


@dataclass(frozen=True, slots=True)
class State:
    """Everything of an environment that changes from slot to slot, to go back to."""

    slot: int
    mine: dict[str, Any]
    simulator: tuple[float, dict[str, Any]]
    history: Floats
    choice: Choice


_MINE = ("_arrived", "_debt_j", "_since_move")


class VectorEnv:
    """N instances: for each of `turns` `high_rows`, `low_rows` and `act`, then `serve`. It never ends by itself."""

    def __init__(
        self,
        cell: Cell,
        climate: Climate,
        *,
        spec: ActionSpec,
        num_instances: int = 64,
        num_slots: int = 256,
        copies: int = 1,
        rng: np.random.Generator,
        weights: Weights | None = None,
        leave_out: frozenset[str] = frozenset(),
        grid: Grid | None = None,
        weather: Weather | None = None,
    ) -> None:
        """Draw the weather, or take what is given (a recorded trace), and begin with empty lines.

        Args:
            cell: of all instances.
            climate: what weather is drawn from; its mean request and budget hold in any case.
            spec: of the actions.
            num_instances: N, where weather is drawn.
            num_slots: T, where weather is drawn; the last slot's rates hold after it.
            copies: of the same weather, where it is drawn; fewer if so many clouds with all their users are not there.
            rng: of the weather.
            weights: of the reward.
            leave_out: kinds of features that an ablation leaves out.
            grid: of the cell, to share its tables among environments.
            weather: instead of drawing it.
        """
        self.cell, self.climate, self.spec = cell, climate, spec
        self.weights = weights or Weights()
        self.grid = grid or Grid(cell.arch, cell.topology, groups=spec.num_groups)
        self.known: References = references(cell.arch, cell.topology, climate.request)
        if weather is None:
            users = climate.users or users_of(self.known)
            copies = math.gcd(copies, max(1, num_instances // users))
            drawn = draw(
                climate, cell.topology, self.known, window_tokens=cell.arch.context_tokens,
                num_instances=num_instances // copies, num_slots=num_slots, slot_s=SLOT_S, rng=rng,
            )  # fmt: skip
            weather = copied(drawn, copies)
        else:
            copies = 1
        self.weather, self.copies = weather, copies
        self.simulator = Simulator(cell.topology, self.weather.requests, slot_s=SLOT_S)
        n = self.num_instances = self.weather.num_instances
        self.longest: Floats = np.array(
            [(r.prompt_tokens + r.output_tokens).max(initial=1) for r in self.weather.requests], float
        )
        self.memory_bytes: Floats = np.tile([d.memory_bytes for d in cell.topology.devices], (n, 1))
        self._base = Rates.of(cell.topology, cell.arch)
        state_pins = cell.topology.origin_holds
        self.static = Static(
            known=self.known, group_layers=self.grid.sizes, num_kv_heads=cell.arch.num_kv_heads,
            hidden_bytes=cell.arch.hidden_dim * cell.arch.dtype_bytes, memory_bytes=self.memory_bytes[0],
            pinned_embedding=state_pins != "none", pinned_head=state_pins == "embedding_and_head",
        )  # fmt: skip
        self._rows = Rows(spec, leave_out)
        self._room = room_of(self.grid, self.memory_bytes, self.longest)
        self._means = self.weather.link_bytes_per_s.mean(1), self.weather.rtt_s.mean(1)
        self.slot = 0
        self._arrived, self._debt_j = np.zeros(n), np.zeros(n)
        self._since_move = np.zeros(n)
        self._history = History(n)
        self._everyone = np.arange(n)
        self._moving_s, self._moved, self._mattered = np.zeros(n), np.zeros(n, bool), np.ones(n, bool)
        self._crowd = Crowd(self.weather.pool, _SHARED)
        self._alone = self._rates_now()
        self._rates = self._alone
        free, usual = np.full((n, spec.num_groups), FREE), np.tile(DEFAULT_KNOBS, (n, 1))
        self.choice = self._plan(free, usual, self._everyone, first=True)
        self._load = self.grid.load(self.choice)
        self._look(self._everyone)

    # What the policy sees

    def seen(self) -> Seen:
        """What is observed of the instances `rows` at this moment, in SI units."""
        simulator, t = self.simulator, self._t
        held = self.grid.memory_bytes(self.choice, simulator.next_tokens)
        return Seen(
            backlog_tokens=simulator.backlog_tokens, arrived_tokens=self._arrived, energy_debt_j=self._debt_j,
            accuracy_debt=np.zeros(self.num_instances), link_bytes_per_s=self.weather.link_bytes_per_s[:, t],
            mean_link_bytes_per_s=self._means[0], rtt_s=self.weather.rtt_s[:, t], mean_rtt_s=self._means[1],
            cloud_free=self._crowd.share[:, CLOUD_DEVICE], context_tokens=simulator.next_tokens,
            serving=simulator.serving, free_memory=1 - held / self.memory_bytes,
            slots_since_move=self._since_move, choice=self.choice,
        )  # fmt: skip

    @property
    def turns(self) -> list[Ints]:
        """Who decides together in this slot, turn by turn; each pool's edges are spread evenly over them."""
        place = np.zeros(self.num_instances, np.int64)
        for members in self._crowd.members:
            place[members] = (np.arange(len(members)) - self.slot) % len(members) * TURNS // len(members)
        return [np.flatnonzero(place == turn) for turn in range(TURNS) if (place == turn).any()]

    def features(self, rows: Ints) -> tuple[Floats32, Floats32]:
        """Features of the whole [n, F] and of each group [n, G, L], for the network."""
        return observe(self.seen().take(rows), self._history.values[rows], self.static)

    def high_rows(self, rows: Ints | None = None) -> Floats32:
        """The layer agent's observations, [n, width]; the same for as long as the turn."""
        rows = self._everyone if rows is None else rows
        self._features = self.features(rows)
        return self._rows.high(*self._features, high_mask(self.spec, self._room.take(rows)))

    def low_rows(self, high: Ints, rows: Ints | None = None) -> Floats32:
        """The second agent's observations after the first one's action, [n, width]."""
        room = self._room.take(self._everyone if rows is None else rows)
        modes = modes_that_fit(self.spec, parts(self.spec.high, high)["mode"], room)
        return self._rows.low(*self._features, modes, low_mask(self.spec, modes, room))

    # What it does

    def act(self, high: Ints, low: Ints | None, rows: Ints, *, judged: bool = False) -> Choice:
        """One turn under both agents' actions; without the second one's, the program decides all shares.

        Args:
            high: the layer agent's, [n, choices].
            low: the second agent's.
            rows: who has the turn.
            judged: look whether they made a difference, which takes a little longer.
        """
        if judged:
            decided, self._mattered[rows] = self._judged(high, low, rows)
        else:
            decided = self.decide(high, low, rows)
        self._history.push(self.seen().take(rows), self.static, rows)
        self._move(decided, rows)
        return decided

    def serve(self) -> StepResult:
        """Serve the slot under the placements decided, and go on to the next; gives what it brought."""
        start, share = self.simulator.now_s, self._crowd.share
        slot = self.simulator.step(self._load, slowed(self._alone, share), share=share)
        there = np.minimum(slot.busy_s / SLOT_S, 1.0) * _SHARED
        harm = delay_to_others(there, self.simulator.backlog_requests.astype(float), self.weather.pool)
        energy, none = slot.energy_j.sum(1), np.zeros(self.num_instances)
        self._debt_j = np.maximum(self._debt_j + energy - self.climate.power_w * SLOT_S, 0.0)
        self._arrived = slot.arrived_tokens
        spent = Spent(
            waiting_s=self._waited(start), congestion_s=harm.sum(1) * SLOT_S, energy_j=energy, accuracy_loss=none,
            moving_s=self._moving_s, backlog_tokens=self.simulator.backlog_tokens, energy_debt_j=self._debt_j,
            accuracy_debt=none,
        )  # fmt: skip
        terms = terms_of(spent, self.weights, self.known)
        outcome = StepResult(
            rewards=rewards_of(terms),
            terms=terms,
            moved=self._moved,
            mattered=self._mattered,
            cloud_used=(there * share)[:, CLOUD_DEVICE],
            choice=self.choice,
        )
        self.slot += 1
        self._moving_s, self._moved = none.copy(), np.zeros(self.num_instances, bool)
        self._mattered = np.ones(self.num_instances, bool)
        self._alone = self._rates_now()
        self._look(self._everyone)
        return outcome

    def step(self, high: Ints, low: Ints | None = None) -> StepResult:
        """A whole slot under actions that do not depend on whose turn it is, [N, choices]."""
        for rows in self.turns:
            self.act(high[rows], None if low is None else low[rows], rows)
        return self.serve()

    def times(self, copies: int) -> VectorEnv:
        """A new one whose instances are those of this one so many times over, from the beginning."""
        return VectorEnv(
            self.cell, self.climate, spec=self.spec, rng=np.random.default_rng(0), weights=self.weights,
            grid=self.grid, weather=copied(self.weather, copies),
        )  # fmt: skip

    def state(self) -> State:
        """Everything that changes from slot to slot."""
        mine = {k: getattr(self, k).copy() for k in _MINE}
        return State(self.slot, mine, self.simulator.state(), self._history.values.copy(), Choice.stack([self.choice]))

    def restore(self, state: State, source: Ints) -> None:
        """Go back to a state, each instance to that of another one under the same weather, [N]."""
        self.slot = state.slot
        for k, values in state.mine.items():
            setattr(self, k, values[source])
        self.simulator.restore(state.simulator, source)
        self._history.values = state.history[source]
        self.choice = state.choice.take(source)
        self._load = self.grid.load(self.choice)
        self._alone = self._rates_now()
        self._look(self._everyone)

    def expert(self, rows: Ints) -> Choice:
        """What the program alone would do now, with the knobs as they are by default."""
        free = np.full((len(rows), self.spec.num_groups), FREE)
        return self._plan(free, np.tile(DEFAULT_KNOBS, (len(rows), 1)), rows)

    def decide(self, high: Ints, low: Ints | None = None, rows: Ints | None = None) -> Choice:
        """The placements that two actions mean now; they always fit."""
        rows = self._everyone if rows is None else rows
        return decided(
            self.grid, lambda modes, knobs, at: self._plan(modes, knobs, rows[at]), high, low, spec=self.spec,
            static=self.static, room=self._room.take(rows), longest_tokens=self.longest[rows],
            memory_bytes=self.memory_bytes[rows],
        )  # fmt: skip

    def _plan(self, modes: Ints, knobs: Ints, rows: Ints, *, first: bool = False) -> Choice:
        """The exact program for one slot under the knobs [n, 3], with the modes [n, G] that are fixed.

        Where nobody waits all stays as it is: what would be chosen is not used.
        """
        modes = modes[:, : self.grid.num_groups]
        waits = np.arange(len(rows)) if first else np.flatnonzero(self.simulator.next_tokens[rows] > 1)
        if not len(waits):
            return self.choice.take(rows)
        modes, at = modes[waits], rows[waits]
        planned_now = planned(
            self.grid, self._moment(at, first=first), knobs[waits], known=self.known, request=self.climate.request,
            weights=self.weights, allowed=allowed_modes(modes),
        )  # fmt: skip
        if len(waits) == len(rows):
            return planned_now
        choice = self.choice.take(rows)
        choice.put(waits, planned_now)
        return choice

    def _moment(self, rows: Ints, *, first: bool = False) -> Moment:
        return Moment(
            rates=self._rates.take(rows), cloud_free=self._crowd.share[rows, CLOUD_DEVICE],
            backlog_tokens=self.simulator.backlog_tokens[rows], arrived_tokens=self._arrived[rows],
            energy_debt_j=self._debt_j[rows], longest_tokens=self.longest[rows], memory_bytes=self.memory_bytes[rows],
            slot_s=SLOT_S, current=None if first else self.choice.take(rows),
        )  # fmt: skip

    def _judged(self, high: Ints, low: Ints | None, rows: Ints) -> tuple[Choice, Bools]:
        """What is decided, and whether someone waits and other knobs (default, highest price) lead elsewhere, [n]."""
        waits = self.simulator.next_tokens[rows] > 1
        at = np.flatnonzero(waits)
        if self.spec.variant != "dp_knobs" or not len(at):
            return self.decide(high, low, rows), waits
        others = [np.tile([*DEFAULT_KNOBS[:2], price], (len(at), 1)) for price in (DEFAULT_KNOBS[2], len(PRICES) - 1)]
        knobs = np.concatenate([high[at, self.spec.num_groups :], *others])
        all_three = self._plan(np.full((len(knobs), self.spec.num_groups), FREE), knobs, np.tile(rows[at], 3))
        first, *rest = (all_three.take(slice(i * len(at), (i + 1) * len(at))) for i in range(3))
        waits[at] = ~(first.same_as(rest[0]) & first.same_as(rest[1]))
        choice = self.choice.take(rows)
        choice.put(at, first)
        return choice, waits

    # What moving costs

    def _cached(self) -> Floats:
        simulator = self.simulator
        return np.where(simulator.serving, simulator.context_tokens, 0.0)

    def _move(self, decided: Choice, rows: Ints) -> None:
        """Go to the placements decided where that ends."""
        moves = ~decided.same_as(self.choice.take(rows))
        at, new = rows[moves], decided.take(moves)
        if len(at):
            quick, replays = way_s(self.grid, self.choice.take(at), new, self._rates.take(at), self._cached()[at])
            goes = np.isfinite(quick)
            at, new, quick, replays = at[goes], new.take(goes), quick[goes], replays[goes]
        if len(at):
            for i, seconds, replay in zip(at, quick, replays, strict=True):
                if replay:
                    self.simulator.lose_cache(int(i))
                elif seconds > 0:
                    self.simulator.pause(int(i), float(seconds))
            self._moving_s[at], self._moved[at] = quick, True
            self.choice.put(at, new)
            self._load.put(at, self.grid.load(new))
            self._look(at)
        self._since_move[rows] += 1
        self._since_move[at] = 0.0

    def _look(self, rows: Ints) -> None:
        """Reckon anew who shares the cloud after the lines `rows` have chosen."""
        self._crowd.look(self.simulator, self._load, self._alone, rows)
        self._rates = slowed(self._alone, self._crowd.share)

    # The world

    @property
    def _t(self) -> int:
        return min(self.slot, self.weather.num_slots - 1)

    def _rates_now(self) -> Rates:
        """Rates of this slot, with the cloud to oneself."""
        t, n, base = self._t, self.num_instances, self._base
        crossing = ~np.eye(2, dtype=bool)
        return replace(
            base,
            **{k: np.repeat(getattr(base, k), n, axis=0) for k in _STILL},
            link_bytes_per_s=self.weather.link_bytes_per_s[:, t, None, None] * crossing,
            latency_s=self.weather.rtt_s[:, t, None, None] / 2 * crossing,
        )

    def _waited(self, start: float) -> Floats:
        """Seconds that requests were in the system since a time, summed over requests, [N]: finish minus arrival."""
        s = self.simulator
        until = np.minimum(np.where(np.isnan(s.finish_s), np.inf, s.finish_s), s.now_s)
        waited: Floats = np.maximum(0.0, until - np.maximum(s.arrival_s, start)).sum(1)
        return waited
