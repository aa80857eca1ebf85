"""Whether moving to a proposal pays within the interval: migration charged against the time that it saves."""

from __future__ import annotations

from splitray.cost import CostModel
from splitray.migration import delay_s, diff
from splitray.placement import Placement
from splitray.planners.memory import shortfall
from splitray.planners.protocol import ClusterState


def keep_or_move(fresh: Placement, state: ClusterState, end: ClusterState, *, staged: bool) -> Placement:
    """The fresh placement where it pays or must be, else the current one.

    It pays if the tokens of the interval save more than the moves take: N (T_old - T_new) > D_mig (SPEC 4.5).

    Args:
        fresh: the proposal.
        state: now; its current placement and its context are what moves.
        end: the state at the end of the interval; a current placement that will not fit by then has to go.
        staged: weights lie on every device, so that only the KV moves.
    """
    if state.current is None or state.current == fresh or shortfall(state.current, end):
        return fresh
    cost = CostModel(state.arch, state.topology)
    before, after = (cost.tpot_s(p, context_tokens=max(1, state.context_tokens)) for p in (state.current, fresh))
    moves = diff(state.current, fresh, state.arch, state.context_tokens)
    pays = state.interval_tokens * (before - after) > delay_s(moves, state.topology, staged=staged)
    return fresh if pays else state.current
