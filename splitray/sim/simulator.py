"""One slot of many instances at once: requests wait in line, are prefilled and decoded at the price of cost.py.

An instance is one placement (that may change from slot to slot) with its own arrivals and its own network. Each serves
one sequence at a time, first come first served, as the engine does; within a slot time is continuous, so a request may
end at any moment. Rates and placement hold for the slot. Steps are priced at the context that the head of the line has
at the beginning of the slot or when it gets there; a prompt costs what step_cost says for its length.

Shapes: N instances, R requests, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.cost import Load, Rates, StepCost, prompt_s, step_cost
from splitray.sim.workload import Requests
from splitray.topology import Topology

_STATE = ("first_token_s", "finish_s", "failed", "_head", "_done", "_prefill_left", "_pause_s", "_arrived")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What lines have to do in a slot, at most what fits into it.

    Busy seconds of each device, all seconds, and for how long they have something to do.
    """

    busy_s: Floats  # [.., D]
    all_s: Floats  # [..]
    window_s: Floats  # [..]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one slot brought: tokens asked for and generated, joule by device, and the price of a token, [N]."""

    arrived_tokens: Floats
    served_tokens: Floats
    energy_j: Floats  # [N, D]
    busy_s: Floats  # [N, D], computing
    tpot_s: Floats
    token_j: Floats


@dataclass(frozen=True, slots=True)
class Head:
    """The request at the head of one line: whether it is there in this slot, and tokens in its KV cache.

    `next_tokens` are those that its next step will have, 1 if nobody waits; `cached_tokens` those of now.
    """

    waits: bool
    next_tokens: float
    cached_tokens: float


@dataclass(frozen=True, slots=True)
class _Price:
    """Seconds [N], joule and busy seconds [N, D] of a token of the head of each line, and of its whole prompt."""

    token_s: Floats
    token_j: Floats
    token_busy_s: Floats
    fill_s: Floats
    fill_j: Floats
    fill_busy_s: Floats

    def put(self, rows: Ints, other: _Price) -> None:
        """Overwrite the prices of the lines `rows`, in place."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


class Simulator:
    """The lines of N instances and a virtual clock.

    `first_token_s` and `finish_s` are [N, R], NaN where a request has not got that far (or is not there); `failed`
    marks those that were given up.
    """

    def __init__(self, topology: Topology, requests: Sequence[Requests], *, slot_s: float = 1.0) -> None:
        """Begin at time 0 with empty lines."""
        self.slot_s, self.now_s, self._topology = slot_s, 0.0, topology
        n, most = len(requests), max((len(r) for r in requests), default=0) + 1
        self.arrival_s = np.full((n, most), np.inf)
        self.prompt_tokens, self.output_tokens = np.ones((n, most)), np.ones((n, most))
        for i, r in enumerate(requests):
            self.arrival_s[i, : len(r)] = r.arrival_s
            self.prompt_tokens[i, : len(r)] = r.prompt_tokens
            self.output_tokens[i, : len(r)] = r.output_tokens
        self.first_token_s, self.finish_s = np.full((n, most), np.nan), np.full((n, most), np.nan)
        self.failed = np.zeros((n, most), bool)
        self._head = np.zeros(n, np.int64)
        self._done = np.zeros(n)  # tokens of the head that exist
        self._prefill_left = np.ones(n)
        self._pause_s = np.zeros(n)
        self._rows = np.arange(n)
        self._power = [np.array([getattr(d, k) for d in topology.devices]) for k in ("idle_w", "active_w", "radio_w")]
        self._asked = np.cumsum(np.concatenate([np.zeros((n, 1)), self.output_tokens], axis=1), axis=1)
        self._arrived = np.zeros(n)

    @property
    def serving(self) -> Bools:
        """Whether the head of each line has a KV cache, whole or in part, [N]."""
        return (self.arrival_s[self._rows, self._head] <= self.now_s) & (self._prefill_left < 1)

    @property
    def context_tokens(self) -> Floats:
        """Tokens in the KV cache of the sequence at the head of each line, 1 if there is none, [N]."""
        known = self.prompt_tokens[self._rows, self._head] + self._done
        return np.where(self.serving, known, 1.0)

    @property
    def next_tokens(self) -> Floats:
        """Tokens that the next step of each line will have in its cache, begun or not, 1 where nobody waits, [N]."""
        waits = self.arrival_s[self._rows, self._head] < self.now_s + self.slot_s
        return np.where(waits, self.prompt_tokens[self._rows, self._head] + self._done, 1.0)

    def state(self) -> tuple[float, dict[str, Any]]:
        """Everything that changes: the time, and arrays by name."""
        return self.now_s, {name: getattr(self, name).copy() for name in _STATE}

    def restore(self, state: tuple[float, dict[str, Any]], source: Ints) -> None:
        """Go back to a state, each line to that of another one with the same requests, [N]."""
        self.now_s = state[0]
        for name, values in state[1].items():
            setattr(self, name, values[source])

    def head(self, instance: int) -> Head:
        """Of one line, as `next_tokens`, `context_tokens` and `serving` say for all."""
        at = instance, self._head[instance]
        arrival_s, tokens = self.arrival_s[at], float(self.prompt_tokens[at] + self._done[instance])
        waits = bool(arrival_s < self.now_s + self.slot_s)
        serving = arrival_s <= self.now_s and self._prefill_left[instance] < 1
        return Head(waits, tokens if waits else 1.0, tokens if serving else 0.0)

    @property
    def backlog_tokens(self) -> Floats:
        """Tokens asked for and not yet generated, [N]."""
        return self._arrived - self._asked[self._rows, self._head] - self._done

    @property
    def backlog_requests(self) -> Ints:
        """Requests that have come and are not finished, [N]."""
        return (self.arrival_s <= self.now_s).sum(1) - self._head

    @property
    def mean_latency_s(self) -> Floats:
        """From arrival to last token, the mean over each line's requests; who is not done counts with its age, [N]."""
        there = np.isfinite(self.arrival_s)
        until = np.where(np.isnan(self.finish_s), self.now_s, self.finish_s)
        waited = np.where(there, until - np.where(there, self.arrival_s, 0.0), 0.0).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return waited / there.sum(1)

    def pause(self, instance: int, seconds: float) -> None:
        """Nothing is generated for so long: a migration."""
        self._pause_s[instance] += seconds

    def lose_cache(self, instance: int) -> None:
        """The KV cache of the head of the line is gone: its prompt and tokens are prefilled anew."""
        self._prefill_left[instance] = 1.0

    def fail_head(self, instance: int) -> None:
        """Give the request at the head of a line up; the next one moves up."""
        self.failed[instance, self._head[instance]] = True
        self._head[instance] += 1
        self._done[instance], self._prefill_left[instance] = 0.0, 1.0

    def step(self, load: Load, rates: Rates, *, up: Bools | None = None, share: Floats | None = None) -> Slot:
        """One slot.

        Args:
            load: of the placement of each instance; of all devices of the topology, or of those that take part.
            rates: of the same devices and their links; N as there, or 1.
            up: instances all of whose devices are there, [N]; others wait.
            share: of each device that a line has while it is there, as the rates say too, [N, D]; it pays for no more
                of the device's energy. All by default.
        """
        slot_end, n = self.now_s + self.slot_s, len(self._rows)
        rows, price = self._rows, self._prices(self._rows, load, rates, slot_end)
        able = np.isfinite(price.token_s)
        if up is not None:
            able &= up
        arrived = (self.output_tokens * (self.arrival_s < slot_end)).sum(1)
        fresh, self._arrived = arrived - self._arrived, arrived
        clock = self.now_s + np.minimum(self._pause_s, self.slot_s)
        self._pause_s = np.maximum(0.0, self._pause_s - self.slot_s)
        clock = np.where(able, clock, slot_end)
        served, spent, busy = np.zeros(n), np.zeros(price.token_j.shape), np.zeros(price.token_j.shape)
        tpot, token_j = price.token_s.copy(), price.token_j.sum(1)
        while True:
            clock = np.maximum(clock, self.arrival_s[rows, self._head])
            active = clock < slot_end
            if not active.any():
                break
            need = np.maximum(price.fill_s, 1e-12)
            time_left = np.where(active, slot_end - clock, 0.0)
            filled = np.minimum(self._prefill_left, time_left / need)
            clock = clock + np.where(filled > 0, filled * np.where(np.isfinite(need), need, 0.0), 0.0)
            spent += filled[:, None] * price.fill_j
            busy += filled[:, None] * price.fill_busy_s
            self._prefill_left = self._prefill_left - filled
            ready = active & (self._prefill_left <= 1e-12)
            first = ready & (self._done == 0)
            self.first_token_s[rows[first], self._head[first]] = clock[first]
            self._done = np.where(first, 1.0, self._done)
            served += first
            left = np.where(ready, self.output_tokens[rows, self._head] - self._done, 0.0)
            token_s = np.where(np.isfinite(price.token_s), price.token_s, 1.0)
            tokens = np.where(ready, np.minimum(left, np.maximum(0.0, slot_end - clock) / token_s), 0.0)
            clock = clock + tokens * token_s
            self._done, served = self._done + tokens, served + tokens
            spent += tokens[:, None] * price.token_j
            busy += tokens[:, None] * price.token_busy_s
            ended = ready & (left - tokens <= 1e-9)
            self.finish_s[rows[ended], self._head[ended]] = clock[ended]
            self._head = self._head + ended
            self._done = np.where(ended, 0.0, self._done)
            self._prefill_left = np.where(ended, 1.0, self._prefill_left)
            clock = np.where(active & ~ended, slot_end, clock)
            again = np.flatnonzero(ended & (clock < slot_end) & (self.arrival_s[rows, self._head] < slot_end))
            if len(again):  # the next in line has a prompt of its own
                price.put(again, self._prices(again, load, rates, slot_end))
        self.now_s = slot_end
        assert np.isfinite(spent).all() and np.isfinite(self._prefill_left).all(), "energy and progress are numbers"
        if share is not None:
            spent = spent * share
        return Slot(
            arrived_tokens=fresh, served_tokens=served, energy_j=spent, busy_s=busy, tpot_s=tpot, token_j=token_j
        )

    def wanted(self, rows: Ints, load: Load, rates: Rates) -> Wanted:
        """What some lines could do in the coming slot, without doing it.

        `load` is of the placements of all, `rates` of devices that each has to itself.
        """
        slot_end, head = self.now_s + self.slot_s, self._head[rows]
        price = self._prices(rows, load, rates, slot_end)
        begins = np.maximum(self.now_s + np.minimum(self._pause_s[rows], self.slot_s), self.arrival_s[rows, head])
        window_s = np.where(np.isfinite(price.token_s), np.maximum(0.0, slot_end - begins), 0.0)
        came = self.arrival_s[rows] < slot_end
        tokens = (self.output_tokens[rows] * came).sum(1) - self._asked[rows, head] - self._done[rows]
        prompts = self._prefill_left[rows] + np.maximum(0, came.sum(1) - head - 1)
        works = window_s > 0
        fill_s = np.where(np.isfinite(price.fill_s), price.fill_s, 0.0)
        token_s = np.where(works, price.token_s, 0.0)
        all_s = prompts * fill_s + tokens * token_s
        busy_s = prompts[:, None] * price.fill_busy_s + tokens[:, None] * price.token_busy_s
        part = np.where(works, np.minimum(1.0, window_s / np.maximum(all_s, 1e-12)), 0.0)
        return Wanted(busy_s=busy_s * part[:, None], all_s=all_s * part, window_s=window_s)

    def _prices(self, rows: Ints, load: Load, rates: Rates, slot_end: float) -> _Price:
        """What the heads of some lines cost: a token, and the whole prompt of those that may prefill in this slot.

        A token counts as made when the next one could be embedded; if the origin cannot be reached it never is.
        """
        n, head = len(rows), self._head[rows]
        length = self.prompt_tokens[rows, head] + self._done[rows]
        fills = np.flatnonzero((self.arrival_s[rows, head] < slot_end) & (self._prefill_left[rows] > 0))
        both, new = np.concatenate([rows, rows[fills]]), np.concatenate([np.ones(n), length[fills]])
        whole = n == load.num_instances and not len(fills)
        part = load if whole else load.take(both)
        here = rates if whole or len(rates.flops_per_s) == 1 else rates.take(both)
        step = step_cost(part, here, context_tokens=np.concatenate([length, length[fills]]), new_tokens=new)
        step = step.over(self._topology, load.devices)
        joule = self._joule(step)
        fill_s, fill_j = np.full(n, np.inf), np.zeros((n, joule.shape[1]))  # who has no price waits for the next slot
        fill_s[fills] = (step.origin_s + prompt_s(part, here, new))[n:]
        fill_j[fills] = joule[n:]
        fill_busy_s = np.zeros_like(fill_j)
        fill_busy_s[fills] = np.where(np.isfinite(fill_s[fills])[:, None], step.busy_s[n:], 0.0)
        token_s: Floats = np.where(np.isfinite(step.origin_s[:n]), step.cycle_s[:n], np.inf)
        busy_s = np.where(np.isfinite(token_s)[:, None], step.busy_s[:n], 0.0)
        return _Price(token_s, joule[:n], busy_s, fill_s, fill_j, fill_busy_s)

    def _joule(self, step: StepCost) -> Floats:
        """Idle, active and radio energy of each device during a step, [.., D]; 0 where a step never ends."""
        idle, active, radio = self._power
        ends = np.isfinite(step.cycle_s)[:, None]
        seconds = np.where(ends, step.cycle_s[:, None], 0.0)
        sends = np.where(np.isfinite(step.radio_s), step.radio_s, 0.0)  # over a link that is down nothing is sent
        joule: Floats = idle * seconds + (active - idle) * step.busy_s + radio * sends
        return np.where(ends, joule, 0.0)
