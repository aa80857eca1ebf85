"""The one-slot problem as a dynamic program: a token's cost, sub-block by sub-block, if devices wait for each other.

State: the holding of the sub-block that was just done. All its devices are taken to be done when the last of them is,
so the cost of a step depends on two neighbouring holdings only and the program is exact for it. A chain of whole
sub-blocks takes exactly this time; a partitioned one takes at most this time, as `CostModel` lets clocks run ahead.
The shares of a partitioned sub-block are those that finish first.

Shapes: S holdings, E holdings of the embedding, D devices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.planners.optimum.enumerate import Step
from splitray.planners.optimum.search import pour
from splitray.planners.optimum.space import MISSING_S, Counts, Kind, Space
from splitray.planners.protocol import RequestShape
from splitray.route import TOKEN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a token's cost is made of: time, energy above idling, memory ([D], while it is scarce), accuracy.

    The energy of edge devices may cost more than that of others.
    """

    per_second: float = 1.0
    per_joule: float = 0.0
    per_edge_joule: float = 0.0
    per_byte: Floats | None = None
    per_loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The cheapest path: its cost and seconds by this program, its steps, the embedding's holding, bytes held [D]."""

    cost: float
    seconds: float
    path: tuple[Step, ...]
    embedding: int
    held_bytes: Floats

    def fits(self, space: Space) -> bool:
        """Whether it needs no more memory than there is, and no missing link."""
        return bool((self.held_bytes <= space.memory_bytes).all()) and self.seconds < MISSING_S / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """Going from any holding to any other: the cost [S, S], the pieces [S, S, D] of each part, and seconds [S, S]."""

    cost: Floats
    counts: tuple[Ints, ...]
    seconds: Floats

    def __getitem__(self, rows: slice) -> _Stage:
        """The steps from some of the holdings before."""
        return _Stage(cost=self.cost[rows], counts=tuple(c[rows] for c in self.counts), seconds=self.seconds[rows])


class Additive:
    """The program of one space at one set of prices.

    With the shape of requests, a token also pays its share of the prompt: the same holdings and pieces do the prompt's
    positions, its ids travel from the origin to the embedding, and the request's tokens share the bill. `seconds` of
    what is chosen are those of a later token all the same.
    """

    def __init__(self, space: Space, prices: Prices, request: RequestShape | None = None) -> None:
        """Price every step that may follow another."""
        self.space, self.prices = space, prices
        self.prompt, self.prompt_share = None, 0.0
        if request is not None:
            self.prompt = Space(space.state, space.freedom, positions=request.prompt_tokens, deadline=space.deadline)
            self.prompt_share = 1 / request.output_tokens
        devices = space.topology.devices
        joule = np.array([prices.per_joule + prices.per_edge_joule * (d.tier == "edge") for d in devices])
        self._power = joule * [d.active_w - d.idle_w for d in devices]  # what a second costs for its energy
        self._radio = joule * [d.radio_w for d in devices]
        first, later = space.kinds[0], space.kinds[1 : len(space.kinds) // space.arch.num_layers]
        self._members = np.zeros((len(space.holdings), space.num_devices), bool)
        for row, holding in zip(self._members, space.holdings, strict=True):
            row[list(holding.devices)] = True
        crossing, air = space.crossing_s, space.radio_s("crossing")
        begins = np.concatenate([space.entry_s, crossing(first).max(2)])
        both = np.concatenate([space.radio_s("entry"), air])
        there: Floats | None = None
        if self.prompt is not None:
            there = np.concatenate(
                [self.prompt.entry_s + self._ids_s()[:, None, None], self.prompt.crossing_s(first).max(2)]
            )
        begun = self._stage(first, begins, both, there)
        self.entry, self.again = begun[: len(space.tables)], begun[len(space.tables) :]
        self.inside = [
            self._stage(k, crossing(k).max(2), air, None if self.prompt is None else self.prompt.crossing_s(k).max(2))
            for k in later
        ]
        head = crossing("head").max(2)  # one position of a prompt enters the head
        self.head = self._stage("head", head, air, None if self.prompt is None else head)
        ways = np.where(self._members[:, :, None], space.exit_s, -np.inf).max(1)  # [S, E]
        self.exit = prices.per_second * ways + space.radio_s("exit") @ self._radio
        self.exit_seconds = ways

    def _ids_s(self) -> Floats:
        """The way of a prompt's ids from the origin to the last of the embedding's, [E]; for ever without a link."""
        space, origin = self.space, self.space.topology.index[self.space.topology.origin]
        assert self.prompt is not None, "asked for a prompt only"
        rate = space.rates.link_bytes_per_s[0, origin]
        fixed = space.rates.latency_s[0, origin] + space.rates.exchange_s[0, origin]
        way = np.where(rate > 0, fixed + TOKEN_BYTES * self.prompt.positions / np.where(rate > 0, rate, 1.0), MISSING_S)
        way[origin] = 0.0
        return np.where(space.table_on, way, 0.0).max(1)

    def _stage(self, kind: Kind, arrive: Floats, air: Floats, prompt: Floats | None) -> _Stage:
        """Every step into a sub-block of this kind; `arrive` is when its devices may begin, [before, S, D].

        `prompt` is that for the positions of a prompt.
        """
        space, prices = self.space, self.prices
        space.deadline.check()
        before, allowed = len(arrive), space.allowed(kind)
        finish = np.where(self._members[None], arrive + space.launch_s, -np.inf)
        busy = self._members * space.launch_s
        counts = []
        for part in space.pieces(kind):
            share = np.zeros(arrive.shape, np.int64)
            share[:] = self._members * part.count
            for target, holding in enumerate(space.holdings):
                if holding.partitioned and allowed[target]:
                    devices = list(holding.devices)
                    room = np.full((before, len(devices)), float(part.count))
                    share[:, target, devices] = pour(finish[:, target, devices], part, devices, room)
            counts.append(share)
            finish = finish + share * part.piece_s
        work = busy + sum(c * p.piece_s for c, p in zip(counts, space.pieces(kind), strict=True))
        seconds = np.where(allowed, finish.max(2), np.inf)
        cost = prices.per_second * seconds
        if self._power.any() or self._radio.any():
            cost = cost + work @ self._power + air @ self._radio
        if prompt is not None and self.prompt is not None:
            parts = self.prompt.pieces(kind)
            done = sum((c * p.piece_s for c, p in zip(counts, parts, strict=True)), busy)
            end = np.where(self._members[None], prompt + done, -np.inf).max(2)
            cost = cost + self.prompt_share * (prices.per_second * end + done @ self._power)
        if prices.per_byte is not None:
            cost = cost + sum(
                (c * (prices.per_byte * p.piece_bytes)).sum(2) for c, p in zip(counts, space.pieces(kind), strict=True)
            )
        if prices.per_loss and space.arch.device_weights:
            for c, p in zip(counts, space.pieces(kind), strict=True):
                cost = cost + prices.per_loss * (c / c.sum(2, keepdims=True)) @ space.weights_loss(p.part)
        return _Stage(cost=cost, counts=tuple(counts), seconds=seconds)

    @cached_property
    def _stages(self) -> list[_Stage]:
        """All stages, the first from the embedding, [E, S]; what codec or channel cost included."""
        cycle = [*self.inside, self.again]
        stages = [self.entry, *(cycle[i % len(cycle)] for i in range(len(self.space.kinds) - 2)), self.head]
        state = self.space.state
        if not self.prices.per_loss or state.accuracy is None:
            return stages
        shared = np.array([[h.partitioned] for h in self.space.holdings])
        priced = stages[:1]  # as in `AccuracyTable.route_loss`, what leaves the embedding is not counted
        for i, stage in enumerate(stages[1:], 1):
            whole, part = state.accuracy.boundary_loss(state.codec, i / len(stages), len(stages) - 1)
            loss = np.where(self.space.crosses, np.where(shared, part, whole), 0.0)
            priced.append(replace(stage, cost=stage.cost + self.prices.per_loss * loss))
        return priced

    @cached_property
    def _forward(self) -> tuple[list[Floats], list[Ints]]:
        """The cheapest way to have done each stage with each holding, [E, S], and the holding before."""
        space = self.space
        allowed_e = np.full((len(space.tables), 1), np.inf)
        allowed_e[space.embeddings] = 0.0
        value = self._stages[0].cost + allowed_e
        if self.prices.per_byte is not None:
            value = value + (space.table_on @ (self.prices.per_byte * space.table_bytes))[:, None]
        values: list[Floats] = [value]
        history: list[Ints] = []
        costs, cycle, rise = [s.cost for s in self._stages[1:]], len(self.inside) + 1, 0.0
        for i, cost in enumerate(costs):
            space.deadline.check()
            repeats = i >= cycle and cost is costs[i - cycle]
            if repeats and not rise and i % cycle == 0:
                rise = _rise(values[-1 - cycle], values[-1])
            if repeats and rise:  # all values rose alike over a layer, so they do from here on
                values.append(values[-cycle] + rise)
                history.append(history[-cycle])
                continue
            total = values[-1][:, :, None] + cost  # [E, S, S]
            history.append(total.argmin(1))
            values.append(total.min(1))
        return values, history

    def best(self) -> Chosen:
        """The cheapest path over all holdings, those of the embedding too."""
        values, history = self._forward
        end = values[-1] + self.exit.T
        embedding, last = divmod(int(end.argmin()), end.shape[1])
        at, holdings = last, [last]
        for came in reversed(history):
            at = int(came[embedding, at])
            holdings.append(at)
        return self._chosen(float(end[embedding, last]), holdings[::-1], embedding)

    def near_best(self, many: int) -> tuple[dict[Kind, list[int]], list[int]]:
        """The holdings of each kind and of the embedding with the cheapest paths through them, best first."""
        values, _ = self._forward
        rest = self.exit.T  # [E, S]
        through = {k: np.full(len(self.space.holdings), np.inf) for k in self.space.kinds}
        for i in range(len(self.space.kinds) - 1, -1, -1):
            self.space.deadline.check()
            kind = self.space.kinds[i]
            through[kind] = np.minimum(through[kind], (values[i] + rest).min(0))
            if i:
                rest = (self._stages[i].cost[None] + rest[:, None]).min(2)
        by_embedding = (values[-1] + self.exit.T).min(1)
        chosen = {
            k: [int(h) for h in np.argsort(v, kind="stable")[:many] if np.isfinite(v[h])] for k, v in through.items()
        }
        order = [int(e) for e in np.argsort(by_embedding, kind="stable") if np.isfinite(by_embedding[e])]
        return chosen, order

    def _chosen(self, cost: float, holdings: list[int], embedding: int) -> Chosen:
        space = self.space
        stages = self._stages
        steps = list(zip(map(id, stages), [embedding, *holdings], holdings, strict=False))
        held = space.table_on[embedding] * space.table_bytes
        seconds = float(self.exit_seconds[holdings[-1], embedding])
        counts: dict[tuple[int, int, int], tuple[Counts, ...]] = {}
        for step, times in Counter(steps).items():  # few differ, as layers repeat
            first = steps.index(step)
            stage, kind, at = stages[first], space.kinds[first], step[1:]
            free = space.free_rows(kind, embedding)
            seconds += times * float(stage.seconds[at])
            for count, part in zip(stage.counts, space.pieces(kind), strict=True):
                held = held + times * np.where(free, 0.0, count[at] * part.piece_bytes)
            counts[step] = tuple(tuple(c[at].tolist()) for c in stage.counts)
        path = tuple((step[2], counts[step]) for step in steps)
        return Chosen(cost=cost, seconds=seconds, path=path, embedding=embedding, held_bytes=held)


def _rise(before: Floats, now: Floats) -> float:
    """By how much all values have risen, 0 where they have not risen alike."""
    rise = float(now.min() - before.min())
    alike = (now <= before + rise * (1 + 1e-12)) & (now >= before + rise * (1 - 1e-12))
    return rise if alike.all() else 0.0
