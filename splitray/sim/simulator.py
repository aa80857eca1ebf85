"""One slot of many instances at once: requests wait in line, are prefilled and decoded at the price of cost.py.

An instance is one placement (that may change from slot to slot) with its own arrivals and its own network. Each serves
one sequence at a time, first come first served, as the engine does; within a slot time is continuous, so a request may
end at any moment. Rates and placement hold for the slot. A step is priced at the context that the head of the line has
at the beginning of the slot; a prompt costs what step_cost says for its length, in proportion for those after it.

Shapes: N instances, R requests, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitray.cost import Load, Rates, StepCost, prompt_s, step_cost
from splitray.sim.workload import Requests
from splitray.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one slot brought: tokens asked for and generated, joule by device, and the price of a token, [N]."""

    arrived_tokens: Floats
    served_tokens: Floats
    energy_j: Floats  # [N, D]
    tpot_s: Floats
    token_j: Floats


class Simulator:
    """The lines of N instances and a virtual clock.

    `first_token_s` and `finish_s` are [N, R], NaN where a request has not got that far (or is not there); `failed`
    marks those that were given up.
    """

    def __init__(self, topology: Topology, requests: Sequence[Requests], *, slot_s: float = 1.0) -> None:
        """Begin at time 0 with empty lines."""
        self.slot_s, self.now_s = slot_s, 0.0
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
        self._rows, self._tpot_s = np.arange(n), np.zeros(n)
        self._busy_s = np.zeros((n, len(topology.devices)))
        self._power = [np.array([getattr(d, k) for d in topology.devices]) for k in ("idle_w", "active_w", "radio_w")]
        self._asked = np.cumsum(np.concatenate([np.zeros((n, 1)), self.output_tokens], axis=1), axis=1)
        self._arrived = np.zeros(n)

    @property
    def serving(self) -> NDArray[np.bool_]:
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

    @property
    def backlog_tokens(self) -> Floats:
        """Tokens asked for and not yet generated, [N]."""
        return self._arrived - self._asked[self._rows, self._head] - self._done

    @property
    def backlog_requests(self) -> Ints:
        """Requests that have come and are not finished, [N]."""
        came: Ints = (self.arrival_s <= self.now_s).sum(1) - self._head
        return came

    @property
    def device_backlog_s(self) -> Floats:
        """Each device's queue: the seconds of computing that the tokens waited for will take of it, [N, D]."""
        return self.backlog_tokens[:, None] * self._busy_s

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

    def step(self, load: Load, rates: Rates, *, up: NDArray[np.bool_] | None = None) -> Slot:
        """One slot.

        Args:
            load: of the placement of each instance.
            rates: of its devices and links; N as there, or 1.
            up: instances all of whose devices are there, [N]; others wait.
        """
        rows, slot_end = self._rows, self.now_s + self.slot_s
        prompt = self.prompt_tokens[rows, self._head] + self._done
        tpot, token_j, fill_s, fill_j = self._prices(load, rates, prompt, slot_end)
        able = np.isfinite(tpot)
        if up is not None:
            able &= up
        arrived = (self.output_tokens * (self.arrival_s < slot_end)).sum(1)
        fresh, self._arrived = arrived - self._arrived, arrived
        clock = self.now_s + np.minimum(self._pause_s, self.slot_s)
        self._pause_s = np.maximum(0.0, self._pause_s - self.slot_s)
        clock = np.where(able, clock, slot_end)
        served, spent = np.zeros(len(rows)), np.zeros(token_j.shape)
        token_s = np.where(able, tpot, 1.0)
        while True:
            clock = np.maximum(clock, self.arrival_s[rows, self._head])
            active = clock < slot_end
            if not active.any():
                break
            length = self.prompt_tokens[rows, self._head] + self._done
            need = np.maximum(fill_s * length, 1e-12)
            time_left = np.where(active, slot_end - clock, 0.0)
            share = np.minimum(self._prefill_left, time_left / need)
            clock = clock + np.where(share > 0, share * np.where(np.isfinite(need), need, 0.0), 0.0)
            spent += (share * length)[:, None] * fill_j
            self._prefill_left = self._prefill_left - share
            ready = active & (self._prefill_left <= 1e-12)
            first = ready & (self._done == 0)
            self.first_token_s[rows[first], self._head[first]] = clock[first]
            self._done = np.where(first, 1.0, self._done)
            served += first
            left = np.where(ready, self.output_tokens[rows, self._head] - self._done, 0.0)
            tokens = np.where(ready, np.minimum(left, np.maximum(0.0, slot_end - clock) / token_s), 0.0)
            clock = clock + tokens * token_s
            self._done, served = self._done + tokens, served + tokens
            spent += tokens[:, None] * token_j
            ended = ready & (left - tokens <= 1e-9)
            self.finish_s[rows[ended], self._head[ended]] = clock[ended]
            self._head = self._head + ended
            self._done = np.where(ended, 0.0, self._done)
            self._prefill_left = np.where(ended, 1.0, self._prefill_left)
            clock = np.where(active & ~ended, slot_end, clock)
        self.now_s = slot_end
        return Slot(arrived_tokens=fresh, served_tokens=served, energy_j=spent, tpot_s=tpot, token_j=token_j.sum(1))

    def _prices(
        self, load: Load, rates: Rates, prompt: Floats, slot_end: float
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Seconds [N] and joule [N, D] of a token, and of a token of the prompt for those that may prefill now."""
        n, rows = len(prompt), self._rows
        coming = self.arrival_s[rows, self._head] < slot_end
        left = self.output_tokens[rows, self._head] - self._done
        ending = left * self._tpot_s < 4 * self.slot_s  # by the last price, with a margin
        fills = np.flatnonzero(coming & ((self._prefill_left > 0) | ending))
        both = np.concatenate([rows, fills])
        new = np.concatenate([np.ones(n), prompt[fills]])
        part = load.take(both) if len(fills) else load
        here = rates.take(both) if len(fills) and len(rates.flops_per_s) > 1 else rates
        step = step_cost(part, here, context_tokens=np.concatenate([prompt, prompt[fills]]), new_tokens=new)
        joule = self._joule(step)
        fill_s, fill_j = np.full(n, np.inf), np.zeros((n, joule.shape[1]))  # who has no price waits for the next slot
        fill_s[fills] = (step.origin_s + prompt_s(part, here, new))[n:] / prompt[fills]
        fill_j[fills] = joule[n:] / prompt[fills, None]
        self._tpot_s = np.where(np.isfinite(step.cycle_s[:n]), step.cycle_s[:n], 0.0)
        self._busy_s = step.busy_s[:n]
        return step.cycle_s[:n], joule[:n], fill_s, fill_j

    def _joule(self, step: StepCost) -> Floats:
        """Idle, active and radio energy of each device during a step, [.., D]; 0 where a step never ends."""
        idle, active, radio = self._power
        ends = np.isfinite(step.cycle_s)[:, None]
        seconds = np.where(ends, step.cycle_s[:, None], 0.0)
        sends = np.where(np.isfinite(step.radio_s), step.radio_s, 0.0)  # over a link that is down nothing is sent
        joule: Floats = idle * seconds + (active - idle) * step.busy_s + radio * sends
        return np.where(ends, joule, 0.0)
