"""The myopic planner with every piece and start that the others have: a local search for the next interval.

What is left of Kafetzis et al. (arXiv 2505.02533) is the question: the quickest placement at the present rates, within
the memory at the end of the interval, migration charged. Heads one by one, as the paper places them (myopic.py), is one
start; one device, one cut, contiguous layers and the additive program over all pieces are the others. The search goes
on from the quickest of them by the true clocks (optimum/improve.py).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from splitray.fitted import fitted
from splitray.placement import Placement
from splitray.planners.cut import BestCut
from splitray.planners.layer_dp import LayerDp
from splitray.planners.memory import model_bytes, no_room
from splitray.planners.myopic import Myopic
from splitray.planners.optimum.additive import Additive, Chosen, Prices
from splitray.planners.optimum.deadline import NEVER, Deadline
from splitray.planners.optimum.enumerate import Found
from splitray.planners.optimum.improve import LocalSearch
from splitray.planners.optimum.scarce import priced
from splitray.planners.optimum.space import MISSING_S, Space
from splitray.planners.pay_back import keep_or_move
from splitray.planners.proposals import proposals, runs
from splitray.planners.protocol import ClusterState, Freedom, equal_s_per_joule
from splitray.planners.shares import TensorParallel
from splitray.planners.thrift import thrifty_s
from splitray.planners.whole import BestDevice

_SHARED = 3  # devices that share sub-blocks
_STARTS, _CHANGES = 2, 30
_ROUNDS, _MOST_ROUNDS = 12, 40  # of pricing memory; the most where nothing else fits
_GAIN = 1e-3  # of the time, that a change has to save for the search to go on


@dataclass(frozen=True, slots=True)
class MyopicSearch:
    """A placement for the next interval from the present rates alone.

    `staged`: weights lie on every device, so that only the KV moves. By the `deadline`, `OutOfTime` ends the search.
    """

    staged: bool = True
    deadline: Deadline = NEVER
    space: ClassVar[Freedom] = "all"

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; keeps the current placement where moving does not pay within the interval.

        Fails where no start has room at the end of the interval.
        """
        end = replace(state, context_tokens=state.context_tokens + state.interval_tokens)
        return keep_or_move(_quickest(replace(end, current=None), self.deadline), state, end, staged=self.staged)


def _quickest(state: ClusterState, deadline: Deadline) -> Placement:
    space = Space(Space.part(state), most_shared=_SHARED, deadline=deadline)
    prices = Prices(per_edge_joule=equal_s_per_joule(space.topology))
    chosen = Additive(space, prices).best()
    if _is_far_chain(space, chosen):
        chain = space.placement(chosen.path, chosen.embedding)
        if fitted(chain, state.arch) == chain:
            return chain
    simple = (BestDevice(), BestCut(), LayerDp(), Myopic())
    starts = list(proposals(simple, state)) or list(proposals((TensorParallel(),), state))
    if chosen.fits(space):
        starts.append(fitted(space.placement(chosen.path, chosen.embedding), state.arch))
    elif chosen.seconds < MISSING_S / 2:
        rounds = _ROUNDS if starts else _MOST_ROUNDS
        each = (c for _, c, _ in priced(space, chosen, prices, rounds=rounds) if c.fits(space))
        starts += [fitted(space.placement(c.path, c.embedding), state.arch) for c in each]
    found = {p: thrifty_s(p, state) for p in dict.fromkeys(starts) if runs(p, state)}
    if not found:
        needs = f"a need of {model_bytes(state):,} bytes, and no start of the search that meets it"
        expected = f"room for {state.arch.name} at the end of the interval"
        raise no_room(expected, needs, "add memory or a device, shorten the context, or use the planner proportional")
    for placement in sorted(found, key=lambda each: found[each])[:_STARTS]:
        path = space.path_of(placement)
        if path is not None:
            start = Found(tpot_s=found[placement], path=path[0], embedding=path[1])
            better = LocalSearch(space, start).run(_CHANGES, _GAIN)
            improved = space.placement(better.path, better.embedding)
            executed = fitted(improved, state.arch)
            if executed is improved or runs(executed, state):
                found[executed] = thrifty_s(executed, state)
    return min(found, key=lambda each: found[each])


def _is_far_chain(space: Space, chosen: Chosen) -> bool:
    """Whether whole sub-blocks are best, fit, and no message is as short as one of them: then sharing none pays.

    Such a chain is priced truly by the additive program, whose choice among chains is the best if memory has no price.
    """
    holdings = [space.holdings[h] for h in {h for h, _ in chosen.path}]
    if not chosen.fits(space) or any(len(h.devices) > 1 for h in (*holdings, space.tables[chosen.embedding])):
        return False
    used = sorted({h.devices[0] for h in holdings})
    longest = max(float((p.count * p.piece_s)[used].max()) for k in set(space.kinds) for p in space.pieces(k))
    linked = space.rates.link_bytes_per_s[0] > 0
    hop_s = (space.rates.latency_s[0] + space.rates.exchange_s[0])[linked]
    return bool((hop_s > longest).all())
