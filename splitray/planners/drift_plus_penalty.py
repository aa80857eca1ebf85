"""Ours: each slot the placement of the least drift plus penalty, by an exact dynamic program (docs/equations.md E2.18).

A token that takes T seconds, E joule and an accuracy loss D costs

    (1 + Q + A / 2) T / slot + (V + Z) E + (V + Y) D

with the backlog Q in tokens, the arrivals A of the last slot, and the debts Z and Y of the virtual queues. The waiting
of the backlog is priced while a token is served (a frame of length T), and half of the arrivals beside it: with Q
alone an empty queue is blind to the burst that the slot itself brings. V weighs energy and accuracy against delay; at
its default of 0 only delay counts until a budget is overdrawn.

Where the mean request is known, a token also pays its share of the prompt: what is quick for one position after the
other may be slow for many at once, and a queue grows by requests.

The program is exact for costs that add up over sub-blocks (optimum/additive.py). Where memory binds, bytes are priced
until the placement fits, and nothing is proven. Of placements that cost the same it takes the one that costs the edge
devices less energy, which has a price too small to decide otherwise.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from splitray.cost import CostModel
from splitray.errors import TopologyError
from splitray.placement import Placement
from splitray.planners.exact import simple, too_small
from splitray.planners.memory import shortfall
from splitray.planners.optimum.additive import Additive, Prices
from splitray.planners.optimum.scarce import priced
from splitray.planners.optimum.space import Space
from splitray.planners.pay_back import moving_s
from splitray.planners.protocol import ClusterState, equal_s_per_joule
from splitray.quality.weight_loss import weights_loss
from splitray.route import compile_route


@dataclass(frozen=True, slots=True)
class DriftPlusPenalty:
    """One slot at a time; it moves where the tokens of an interval save more than the move costs.

    Args:
        v: weight of a joule (and of a relative perplexity) against a token that waits for a slot.
        staged: weights lie on every device, so that only the KV moves.
    """

    v: float = 0.0
    staged: bool = True

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where nothing fits into memory."""
        space, prices = Space(Space.part(state)), self.prices(state)
        chosen = Additive(space, prices, state.request).best()
        fitting = [chosen] if chosen.fits(space) else []
        if fitting and not space.rates.shares_memory:
            # No slower than one device or one cut: those chains are in the program, which prices them truly.
            best = space.placement(chosen.path, chosen.embedding)
            if prices.per_loss and (state.accuracy is not None or state.arch.device_weights):
                # What a surrogate tells of a whole may be more than of its parts: never worse than one device.
                alone = itertools.islice(simple(space, state), 1)
                best = min((best, *alone), key=lambda placement: cost_of(placement, state, prices))
            return self._paid_for(best, state, prices)
        if not fitting:
            fitting = [each for _, each, _ in priced(space, chosen, prices, state.request) if each.fits(space)]
        candidates = [*dict.fromkeys(space.placement(c.path, c.embedding) for c in fitting), *simple(space, state)]
        if not candidates:
            raise too_small(space)
        best = min(candidates, key=lambda placement: cost_of(placement, state, prices))
        return self._paid_for(best, state, prices)

    def _paid_for(self, best: Placement, state: ClusterState, prices: Prices) -> Placement:
        """The best placement if what the interval's tokens save pays for the way there, else the current one."""
        if state.current is None or state.current == best or shortfall(state.current, state):
            return best
        if self.staged and state.cached_tokens == 0:
            return best
        # The sequence that pays for the move has its prompt behind it; those that wait have theirs ahead.
        waits = state.request is not None and state.queues.backlog_tokens > state.request.output_tokens
        serving = state if waits else replace(state, request=None)
        try:
            saved = cost_of(state.current, serving, prices) - cost_of(best, serving, prices)
        except TopologyError:  # a link is down that the current one needs
            return best
        moving = prices.per_second * moving_s(state.current, best, state, staged=self.staged)[0]
        return best if state.interval_tokens * saved > moving else state.current

    def prices(self, state: ClusterState) -> Prices:
        """What a second, a joule and a loss weigh in this slot; idling is paid by the second."""
        q = state.queues
        per_joule = self.v + q.energy_debt_j
        idle_w = sum(d.idle_w for d in state.topology.devices)
        waiting = 1 + q.backlog_tokens + q.arrived_tokens / 2
        per_second = waiting / state.slot_s + per_joule * idle_w
        return Prices(
            per_second=per_second,
            per_joule=per_joule,
            per_edge_joule=per_second * equal_s_per_joule(state.topology),
            per_loss=self.v + q.accuracy_debt,
        )


def cost_of(placement: Placement, state: ClusterState, prices: Prices) -> float:
    """What a token of this placement costs at these prices, by its true clocks."""
    cost = CostModel(state.arch, state.topology, codec=state.codec)
    step = cost.decode(placement, context_tokens=max(1, state.context_tokens))
    seconds, idle_w = float(step.cycle_s[0]), sum(d.idle_w for d in state.topology.devices)
    joule = step.energy_j(state.topology)[0]
    edge = np.array([d.tier == "edge" for d in state.topology.devices])
    spent = prices.per_second * seconds + prices.per_joule * (float(joule.sum()) - idle_w * seconds)
    spent += prices.per_edge_joule * float(joule[edge].sum())
    if state.request is not None:
        prompt_s = cost.ttft_s(placement, prompt_tokens=round(state.request.prompt_tokens))
        spent += prices.per_second * prompt_s / state.request.output_tokens
    if prices.per_loss:
        spent += prices.per_loss * weights_loss(placement, state.arch)
    if state.accuracy is None:
        return spent
    route = compile_route(placement, state.arch, state.topology, codec=state.codec)
    return spent + prices.per_loss * state.accuracy.route_loss(route)
