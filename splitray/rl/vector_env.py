"""Many instances of one cell, side by side: what a policy is trained and compared on.

A slot: the policy sees this slot's rates and the queues, its placement is made (by the exact program, as far as it
left that free), a move is paid for as `sim/arena.py` does, and `Simulator` serves the requests. Instances of one pool
share a cloud, which is as slow for each as the others make it (`sim/crowd.py`). Knows no Ray.

Shapes: N instances, G groups, T slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitray.cost import Rates
from splitray.rl.action import (
    DEFAULT_KNOBS,
    FREE,
    PRICES,
    ActionSpec,
    Ints,
    eighths_of,
    high_mask,
    low_mask,
    modes_that_fit,
    parts,
    shared,
)
from splitray.rl.cell import CLOUD_DEVICE, EDGE_DEVICE, Cell, References, references
from splitray.rl.choice import EDGE, MODES, Choice
from splitray.rl.grid import Grid
from splitray.rl.knobs import Moment, planned
from splitray.rl.layout import Rows
from splitray.rl.moving import way_s
from splitray.rl.observation import Floats, History, Seen, Static, observe
from splitray.rl.reward import Spent, Weights, rewards_of, terms_of
from splitray.rl.room import room_of
from splitray.rl.weather import Climate, Weather, copied, draw, users_of
from splitray.sim import crowd
from splitray.sim.crowd import delay_to_others, others_there, slowed
from splitray.sim.simulator import Simulator

SLOT_S = 1.0
_SHARED = np.array([False, True])  # an edge device is nobody else's
_STILL = ("flops_per_s", "bytes_per_s", "launch_s", "exchange_s", "contention_s_per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One slot: rewards in two parts [N, 2], their terms [N] each, and what was moved.

    `mattered`: whether another choice would have led elsewhere, as far as that was asked for, [N].
    """

    rewards: Floats
    terms: dict[str, Floats]
    moved: NDArray[np.bool_]
    mattered: NDArray[np.bool_]
    decided: Choice


class VectorEnv:
    """N instances; `high_rows`, `low_rows` and `step` once a slot, in this order. It never ends by itself."""

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
        self._base = Rates.of(cell.topology)
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
        self._there = np.zeros((n, 2))  # share of the last slot that each line was at each device
        self._history = History(n)
        self._rates = self._rates_now()
        self.choice = self._plan(np.full((n, spec.num_groups), FREE), np.tile(DEFAULT_KNOBS, (n, 1)), first=True)
        self._load = self.grid.load(self.choice)

    # What the policy sees

    def seen(self) -> Seen:
        """This moment, in SI units."""
        simulator, t = self.simulator, self._t
        held = self.grid.memory_bytes(self.choice, simulator.next_tokens)
        return Seen(
            backlog_tokens=simulator.backlog_tokens, arrived_tokens=self._arrived, energy_debt_j=self._debt_j,
            accuracy_debt=np.zeros(self.num_instances), link_bytes_per_s=self.weather.link_bytes_per_s[:, t],
            mean_link_bytes_per_s=self._means[0], rtt_s=self.weather.rtt_s[:, t], mean_rtt_s=self._means[1],
            cloud_free=self._share[:, CLOUD_DEVICE], context_tokens=simulator.next_tokens,
            serving=simulator.serving, free_memory=1 - held / self.memory_bytes,
            slots_since_move=self._since_move, choice=self.choice,
        )  # fmt: skip

    def high_rows(self) -> NDArray[np.float32]:
        """The layer agent's observations, [N, width]; the same for as long as the slot."""
        self._features = observe(self.seen(), self._history, self.static)
        return self._rows.high(*self._features, high_mask(self.spec, self._room))

    def low_rows(self, high: Ints) -> NDArray[np.float32]:
        """The second agent's observations after the first one's action, [N, width]."""
        modes = modes_that_fit(self.spec, parts(self.spec.high, high)["mode"], self._room)
        return self._rows.low(*self._features, modes, low_mask(self.spec, modes, self._room))

    # What it does

    def step(self, high: Ints, low: Ints | None = None, *, judged: bool = False) -> Outcome:
        """One slot under both agents' actions; without the second one's, the program decides all shares.

        Args:
            high: the layer agent's.
            low: the second agent's.
            judged: look whether they made a difference, which takes as long as deciding twice more.
        """
        decided = self.decide(high, low)
        mattered = self._matters(decided) if judged else np.ones(self.num_instances, bool)
        self._history.push(self.seen(), self.static)
        moving_s, moved = self._move(decided)
        start = self.simulator.now_s
        slot, self._there = crowd.step(self.simulator, self._load, self._alone, self.weather.pool, _SHARED)
        harm = delay_to_others(self._there, self.simulator.backlog_requests, self.weather.pool)
        energy = slot.energy_j.sum(1)
        self._debt_j = np.maximum(self._debt_j + energy - self.climate.power_w * SLOT_S, 0.0)
        self._arrived = slot.arrived_tokens
        spent = Spent(
            waiting_s=self._waited(start), congestion_s=harm.sum(1) * SLOT_S, energy_j=energy, accuracy_loss=np.zeros(len(energy)), moving_s=moving_s,
            backlog_tokens=self.simulator.backlog_tokens, energy_debt_j=self._debt_j,
            accuracy_debt=np.zeros(len(energy)),
        )  # fmt: skip
        terms = terms_of(spent, self.weights, self.known)
        self.slot += 1
        self._rates = self._rates_now()
        return Outcome(rewards=rewards_of(terms), terms=terms, moved=moved, mattered=mattered, decided=decided)

    def expert(self) -> Callable[[], Choice]:
        """What the program alone would do now, with the knobs as they are by default."""
        n, free = self.num_instances, np.full((self.num_instances, self.spec.num_groups), FREE)
        return lambda: self._plan(free, np.tile(DEFAULT_KNOBS, (n, 1)))

    def decide(self, high: Ints, low: Ints | None = None) -> Choice:
        """The placements that two actions mean now; they always fit."""
        named = parts(self.spec.high, high)
        modes = modes_that_fit(self.spec, named["mode"], self._room)
        knobs = np.concatenate([named["v"], named["stay"], named["price"]], axis=1)
        if self.spec.variant != "no_dp":
            choice = self._plan(modes, knobs)
            if low is None or not self.spec.low_decides:
                return choice
        else:
            assert low is not None, "without the program the second agent has to say the shares"
            choice = self._outright(modes)
        heads, ffn = eighths_of(self.spec, low)
        g = self.grid.num_groups
        mixed = shared(choice, modes[:, :g], heads[:, :g], ffn[:, :g], self.grid.num_heads)
        over = (self.grid.memory_bytes(mixed, self.longest) > self.memory_bytes).any(1)
        if over.any():  # the edge's room was kept; what is left is a cloud that is full, or a program's own shares
            rows = np.flatnonzero(over)
            mixed.put(rows, self._plan(np.full_like(modes, FREE), knobs).take(rows))
        return mixed

    def _plan(self, modes: Ints, knobs: Ints, *, first: bool = False) -> Choice:
        """The exact program for one slot under the knobs [N, 3], with the modes [N, G] that are fixed."""
        modes = modes[:, : self.grid.num_groups]
        allowed = None
        if (modes != FREE).any():
            allowed = (modes == FREE)[..., None] | (modes[..., None] == 1 + np.arange(MODES))
        moment = self._moment(None if first else self.choice)
        return planned(
            self.grid, moment, knobs, known=self.known, request=self.climate.request, weights=self.weights,
            allowed=allowed,
        )  # fmt: skip

    def _moment(self, current: Choice | None) -> Moment:
        return Moment(
            rates=self._rates, cloud_free=self._share[:, CLOUD_DEVICE], backlog_tokens=self.simulator.backlog_tokens,
            arrived_tokens=self._arrived, energy_debt_j=self._debt_j, longest_tokens=self.longest,
            memory_bytes=self.memory_bytes, slot_s=SLOT_S, current=current,
        )  # fmt: skip

    def _matters(self, decided: Choice) -> NDArray[np.bool_]:
        """Whether someone waits, and the program would go elsewhere with the default knobs or the highest price, [N]."""
        waits = self.simulator.next_tokens > 1
        rows = np.flatnonzero(waits)
        if self.spec.variant != "dp_knobs" or not len(rows):
            return waits
        moment, differs = self._moment(self.choice).take(rows), np.zeros(len(rows), bool)
        for price in (DEFAULT_KNOBS[2], len(PRICES) - 1):
            other = planned(
                self.grid, moment, np.tile([*DEFAULT_KNOBS[:2], price], (len(rows), 1)), known=self.known,
                request=self.climate.request, weights=self.weights,
            )  # fmt: skip
            differs |= ~other.same_as(decided.take(rows))
        waits[rows] = differs
        return waits

    def _outright(self, modes: Ints) -> Choice:
        """The modes as they are, each end where its neighbour is or where it is pinned."""
        modes = modes[:, : self.grid.num_groups] - 1
        pinned = self.static.pinned_embedding, self.static.pinned_head
        ends = [
            np.where(np.full(len(modes), pin) | (modes[:, at] == EDGE), EDGE_DEVICE, CLOUD_DEVICE)
            for pin, at in zip(pinned, (0, -1), strict=True)
        ]
        zeros = np.zeros(modes.shape, np.int64)
        return Choice(modes.astype(np.int8), zeros, zeros, *ends)

    # What moving costs

    def _cached(self) -> Floats:
        simulator = self.simulator
        return np.where(simulator.serving, simulator.context_tokens, 0.0)

    def _move(self, decided: Choice) -> tuple[Floats, NDArray[np.bool_]]:
        """Go to the placements decided where that ends; seconds of moving, and who moved, [N] each."""
        moved = ~decided.same_as(self.choice)
        seconds = np.zeros(self.num_instances)
        rows = np.flatnonzero(moved)
        if len(rows):
            cached = self._cached()[rows]
            new, rates = decided.take(rows), self._rates.take(rows)
            quick, replays = way_s(self.grid, self.choice.take(rows), new, rates, cached)
            goes = np.isfinite(quick)
            moved[rows] = goes
            seconds[rows] = np.where(goes, quick, 0.0)
            for i, replay in zip(rows[goes], replays[goes], strict=True):
                if replay:
                    self.simulator.lose_cache(int(i))
                elif seconds[i] > 0:
                    self.simulator.pause(int(i), float(seconds[i]))
            stay = rows[~goes]
            accepted = Choice.stack([decided])
            accepted.put(stay, self.choice.take(stay))
            self.choice, self._load = accepted, self.grid.load(accepted)
        self._since_move = np.where(moved, 0.0, self._since_move + 1)
        return seconds, moved

    # The world

    @property
    def _t(self) -> int:
        return min(self.slot, self.weather.num_slots - 1)

    def _rates_now(self) -> Rates:
        t, n, base = self._t, self.num_instances, self._base
        crossing = ~np.eye(2, dtype=bool)
        self._alone = replace(
            base,
            **{k: np.repeat(getattr(base, k), n, axis=0) for k in _STILL},
            link_bytes_per_s=self.weather.link_bytes_per_s[:, t, None, None] * crossing,
            latency_s=self.weather.rtt_s[:, t, None, None] / 2 * crossing,
        )
        self._share = 1 / (1 + others_there(self._there, self.weather.pool))
        return slowed(self._alone, self._share)

    def _waited(self, start: float) -> Floats:
        """Seconds that requests were in the system since a time, summed over requests, [N]: finish minus arrival."""
        s = self.simulator
        until = np.minimum(np.where(np.isnan(s.finish_s), np.inf, s.finish_s), s.now_s)
        waited: Floats = np.maximum(0.0, until - np.maximum(s.arrival_s, start)).sum(1)
        return waited
