"""Whether moving to a proposal pays within the interval: migration charged against the time that it saves."""

from __future__ import annotations

from splitray.cost import Load, Rates, load_of, step_cost
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
    where, context = state.topology, max(1, state.context_tokens)
    both = Load.stack([load_of(p, state.arch, where, codec=state.codec) for p in (state.current, fresh)])
    before, after = step_cost(both, Rates.of(where), context_tokens=context).cycle_s
    saved_s = state.interval_tokens * float(before - after)
    if not saved_s > 0:
        return state.current
    moves = diff(state.current, fresh, state.arch, state.context_tokens)
    return fresh if saved_s > delay_s(moves, state.topology, staged=staged) else state.current
