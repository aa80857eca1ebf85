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
    """What one slot brought, [N]: tokens asked for and generated, joule, and the price of a token at its beginning."""

    arrived_tokens: Floats
    served_tokens: Floats
    energy_j: Floats
    tpot_s: Floats
    energy_j_per_token: Floats


class Simulator:
    """The lines of N instances and a virtual clock.

    `first_token_s` and `finish_s` are [N, R], NaN where a request has not got that far (or is not there).
    """

    def __init__(self, topology: Topology, requests: Sequence[Requests], *, slot_s: float = 1.0) -> None:
        """Begin at time 0 with empty lines."""
        self.topology, self.slot_s, self.now_s = topology, slot_s, 0.0
        n, most = len(requests), max((len(r) for r in requests), default=0) + 1
        self.arrival_s = np.full((n, most), np.inf)
        self.prompt_tokens, self.output_tokens = np.ones((n, most)), np.ones((n, most))
        for i, r in enumerate(requests):
            self.arrival_s[i, : len(r)] = r.arrival_s
            self.prompt_tokens[i, : len(r)] = r.prompt_tokens
            self.output_tokens[i, : len(r)] = r.output_tokens
        self.first_token_s, self.finish_s = np.full((n, most), np.nan), np.full((n, most), np.nan)
        self.energy_j = np.zeros(n)
        self._head = np.zeros(n, np.int64)
        self._done = np.zeros(n)  # tokens of the head that exist
        self._prefill_left = np.ones(n)
        self._pause_s = np.zeros(n)
        self._rows, self._tpot_s = np.arange(n), np.zeros(n)
        self._power = [np.array([getattr(d, k) for d in topology.devices]) for k in ("idle_w", "active_w", "radio_w")]
        self._asked = np.cumsum(np.concatenate([np.zeros((n, 1)), self.output_tokens], axis=1), axis=1)
        self._arrived = np.zeros(n)

    @property
    def context_tokens(self) -> Floats:
        """Tokens in the KV cache of the sequence at the head of each line, 1 if there is none, [N]."""
        busy = self.arrival_s[self._rows, self._head] <= self.now_s
        known = self.prompt_tokens[self._rows, self._head] + self._done
        return np.where(busy & (self._prefill_left < 1), known, 1.0)

    @property
    def backlog_tokens(self) -> Floats:
        """Tokens asked for and not yet generated, [N]."""
        return self._arrived - self._asked[self._rows, self._head] - self._done

    @property
    def backlog_requests(self) -> Ints:
        """Requests that have come and are not finished, [N]."""
        came: Ints = (self.arrival_s <= self.now_s).sum(1) - self._head
        return came

    def pause(self, instance: int, seconds: float) -> None:
        """Nothing is generated for so long: a migration."""
        self._pause_s[instance] += seconds

    def lose_cache(self, instance: int) -> None:
        """The KV cache of the head of the line is gone: its prompt and tokens are prefilled anew."""
        self._prefill_left[instance] = 1.0

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
        served, spent = np.zeros(len(rows)), np.zeros(len(rows))
        with np.errstate(invalid="ignore"):
            while True:
                clock = np.maximum(clock, self.arrival_s[rows, self._head])
                active = clock < slot_end
                if not active.any():
                    break
                length = self.prompt_tokens[rows, self._head] + self._done
                need = np.where(active, fill_s * length, 0.0)
                share = np.where(
                    active, np.minimum(self._prefill_left, (slot_end - clock) / np.maximum(need, 1e-12)), 0.0
                )
                clock = np.where(active, clock + share * need, clock)
                spent += np.where(active, share * fill_j * length, 0.0)
                self._prefill_left = np.where(active, self._prefill_left - share, self._prefill_left)
                ready = active & (self._prefill_left <= 1e-12)
                first = ready & (self._done == 0)
                self.first_token_s[rows[first], self._head[first]] = clock[first]
                self._done = np.where(first, 1.0, self._done)
                served += first
                left = np.where(ready, self.output_tokens[rows, self._head] - self._done, 0.0)
                tokens = np.where(ready, np.minimum(left, np.maximum(0.0, slot_end - clock) / tpot), 0.0)
                clock = np.where(ready, clock + tokens * np.where(ready, tpot, 0.0), clock)
                self._done, served = self._done + tokens, served + tokens
                spent += np.where(ready, tokens * np.where(ready, token_j, 0.0), 0.0)
                ended = ready & (left - tokens <= 1e-9)
                self.finish_s[rows[ended], self._head[ended]] = clock[ended]
                self._head = self._head + ended
                self._done = np.where(ended, 0.0, self._done)
                self._prefill_left = np.where(ended, 1.0, self._prefill_left)
                clock = np.where(active & ~ended, slot_end, clock)
        self.energy_j += spent
        self.now_s = slot_end
        return Slot(arrived_tokens=fresh, served_tokens=served, energy_j=spent, tpot_s=tpot, energy_j_per_token=token_j)

    def _prices(
        self, load: Load, rates: Rates, prompt: Floats, slot_end: float
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Seconds and joule of a token, and of a token of the prompt for those that may prefill in this slot, [N]."""
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
        fill_s, fill_j = np.full(n, np.inf), np.zeros(n)  # who has no price waits for the next slot
        fill_s[fills] = (step.origin_s + prompt_s(part, here, new))[n:] / prompt[fills]
        fill_j[fills] = joule[n:] / prompt[fills]
        self._tpot_s = np.where(np.isfinite(step.cycle_s[:n]), step.cycle_s[:n], 0.0)
        return step.cycle_s[:n], joule[:n], fill_s, fill_j

    def _joule(self, step: StepCost) -> Floats:
        idle, active, radio = self._power
        with np.errstate(invalid="ignore"):
            total = idle.sum() * step.cycle_s + step.busy_s @ (active - idle) + step.radio_s @ radio
        joule: Floats = np.where(np.isfinite(step.cycle_s), total, 0.0)
        return joule
