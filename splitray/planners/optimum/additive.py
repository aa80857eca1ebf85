"""The one-slot problem as a dynamic program: a token's cost, sub-block by sub-block, if devices wait for each other.

State: the holding of the sub-block that was just done. All its devices are taken to be done when the last of them is,
so the cost of a step depends on two neighbouring holdings only and the program is exact for it. A chain of whole
sub-blocks takes exactly this time; a partitioned one takes at most this time, as `CostModel` lets clocks run ahead.
The shares of a partitioned sub-block are those that finish first.

Shapes: S holdings, E devices of the embedding, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from splitray.planners.optimum.enumerate import Step
from splitray.planners.optimum.search import pour
from splitray.planners.optimum.space import Counts, Floats, Kind, Space

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a token's cost is made of: time, energy above idling, memory ([D], while it is scarce), accuracy."""

    per_second: float = 1.0
    per_joule: float = 0.0
    per_byte: Floats | None = None
    per_loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The cheapest path: its cost and seconds by this program, its steps, the embedding's device, bytes held [D]."""

    cost: float
    seconds: float
    path: tuple[Step, ...]
    embedding: int
    held_bytes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """Going from any holding to any other: the cost [S, S], the pieces [S, S, D] of each part, and seconds [S, S]."""

    cost: Floats
    counts: tuple[Ints, ...]
    seconds: Floats


class Additive:
    """The program of one space at one set of prices."""

    def __init__(self, space: Space, prices: Prices) -> None:
        """Price every step that may follow another."""
        self.space, self.prices = space, prices
        self._power = np.array([d.active_w - d.idle_w for d in space.topology.devices])
        self._radio = np.array([d.radio_w for d in space.topology.devices])
        first, later = space.kinds[0], space.kinds[1 : len(space.kinds) // space.arch.num_layers]
        self._members = np.array([np.isin(np.arange(space.num_devices), h.devices) for h in space.holdings])
        self.entry = self._stage(first, space.entry_s, space.radio_s("entry"))
        crossing, air = space.crossing_s, space.radio_s("crossing")
        self.inside = [self._stage(k, crossing(k), air) for k in later]
        self.again = self._stage(first, crossing(first), air)
        self.head = self._stage("head", crossing("head"), air)
        ways = np.where(self._members[:, :, None], space.exit_s, -np.inf).max(1)  # [S, E]
        energy = space.radio_s("exit") @ self._radio
        self.exit = prices.per_second * ways + prices.per_joule * energy
        self.exit_seconds = ways

    def _stage(self, kind: Kind, way: Floats, air: Floats) -> _Stage:
        space, prices = self.space, self.prices
        before, s, d = way.shape[0], way.shape[1], space.num_devices
        arrive = way if way.ndim == 3 else way.max(2)  # [before, S, D]
        allowed = space.allowed(kind)
        finish = np.where(self._members[None], arrive + space.launch_s, -np.inf)
        busy = self._members * space.launch_s
        counts = []
        for part in space.pieces(kind):
            share = np.zeros((before, s, d), np.int64)
            for target, holding in enumerate(space.holdings):
                devices = list(holding.devices)
                if not allowed[target]:
                    continue
                if holding.partitioned:
                    share[:, target, devices] = pour(
                        finish[:, target, devices], part, devices, np.full((before, len(devices)), float(part.count))
                    )
                else:
                    share[:, target, devices] = part.count
            counts.append(share)
            finish = finish + share * part.piece_s
        work = busy + sum(c * p.piece_s for c, p in zip(counts, space.pieces(kind), strict=True))
        seconds = np.where(allowed, finish.max(2), np.inf)
        cost = prices.per_second * seconds
        if prices.per_joule:
            cost = cost + prices.per_joule * (work @ self._power + air @ self._radio)
        if prices.per_byte is not None:
            cost = cost + sum(
                (c * prices.per_byte).sum(2) * p.piece_bytes for c, p in zip(counts, space.pieces(kind), strict=True)
            )
        return _Stage(cost=cost, counts=tuple(counts), seconds=seconds)

    @cached_property
    def _stages(self) -> list[_Stage]:
        """The stages after the first."""
        cycle = [*self.inside, self.again]
        stages = [cycle[i % len(cycle)] for i in range(len(self.space.kinds) - 2)] + [self.head]
        state = self.space.state
        if not self.prices.per_loss or state.codec == "none" or state.accuracy is None:
            return stages
        shared = np.array([[h.partitioned] for h in self.space.holdings])
        priced = []
        for i, stage in enumerate(stages):
            whole, part = state.accuracy.boundary_loss(state.codec, (i + 1) / (len(stages) + 1), len(stages))
            loss = np.where(self.space.crosses, np.where(shared, part, whole), 0.0)
            priced.append(replace(stage, cost=stage.cost + self.prices.per_loss * loss))
        return priced

    @cached_property
    def _forward(self) -> tuple[list[Floats], list[Ints]]:
        """The cheapest way to have done each stage with each holding, [E, S], and the holding before."""
        space = self.space
        allowed_e = np.full((space.num_devices, 1), np.inf)
        allowed_e[space.embeddings] = 0.0
        value = self.entry.cost + allowed_e
        if self.prices.per_byte is not None:
            value = value + (self.prices.per_byte * space.table_bytes)[:, None]
        values, history = [value], []
        for stage in self._stages:
            total = value[:, :, None] + stage.cost  # [E, S, S]
            came = total.argmin(1)
            value = total.min(1)
            values.append(value)
            history.append(came)
        return values, history

    def best(self) -> Chosen:
        """The cheapest path over all holdings and all devices of the embedding."""
        values, history = self._forward
        end = values[-1] + self.exit.T
        embedding, last = divmod(int(end.argmin()), end.shape[1])
        at, holdings = last, [last]
        for came in reversed(history):
            at = int(came[embedding, at])
            holdings.append(at)
        return self._chosen(float(end[embedding, last]), holdings[::-1], embedding)

    def near_best(self, many: int) -> tuple[dict[Kind, list[int]], list[int]]:
        """The holdings of each kind and the embedding's devices with the cheapest paths through them, best first."""
        values, _ = self._forward
        rest = self.exit.T  # [E, S]
        through = {k: np.full(len(self.space.holdings), np.inf) for k in self.space.kinds}
        for i in range(len(self.space.kinds) - 1, -1, -1):
            kind = self.space.kinds[i]
            through[kind] = np.minimum(through[kind], (values[i] + rest).min(0))
            if i:
                rest = (self._stages[i - 1].cost[None] + rest[:, None]).min(2)
        by_embedding = (values[-1] + self.exit.T).min(1)
        chosen = {
            k: [int(h) for h in np.argsort(v, kind="stable")[:many] if np.isfinite(v[h])] for k, v in through.items()
        }
        order = [int(e) for e in np.argsort(by_embedding, kind="stable") if np.isfinite(by_embedding[e])]
        return chosen, order

    def _chosen(self, cost: float, holdings: list[int], embedding: int) -> Chosen:
        space = self.space
        held = np.where(np.arange(space.num_devices) == embedding, space.table_bytes, 0.0)
        seconds, path = 0.0, []
        known: dict[tuple[int, int, int], tuple[float, tuple[Counts, ...], Floats]] = {}
        for i, (stage, kind) in enumerate(zip([self.entry, *self._stages], space.kinds, strict=True)):
            key = (id(stage), holdings[i - 1] if i else embedding, holdings[i])
            if key not in known:
                at = key[1:]
                each = tuple(tuple(c[at].tolist()) for c in stage.counts)
                free = space.free_rows(kind, embedding)
                grown = np.zeros(space.num_devices)
                for count, part in zip(stage.counts, space.pieces(kind), strict=True):
                    grown = grown + np.where(free, 0.0, count[at] * part.piece_bytes)
                known[key] = float(stage.seconds[at]), each, grown
            step_s, counts, grown = known[key]
            seconds, held = seconds + step_s, held + grown
            path.append((holdings[i], counts))
        seconds += float(self.exit_seconds[holdings[-1], embedding])
        return Chosen(cost=cost, seconds=seconds, path=tuple(path), embedding=embedding, held_bytes=held)
