"""Whether moving to a proposal pays within the interval: migration charged against the time that it saves."""

import math

from splitray.cost import CostModel, Load, Rates, load_of, step_cost
from splitray.errors import TopologyError
from splitray.migration import delay_s, diff
from splitray.placement import Placement
from splitray.planners.memory import shortfall
from splitray.planners.protocol import ClusterState


def moving_s(old: Placement, new: Placement, state: ClusterState, *, staged: bool) -> tuple[float, bool]:
    """Seconds until the new placement generates, and whether by replaying the tokens instead of sending their KV.

    Replaying is a prompt of all cached tokens in the new place; it needs the weights there. Infinite where a link is
    down that either way needs.
    """
    cached = state.context_tokens if state.cached_tokens is None else state.cached_tokens
    send_s = delay_s(diff(old, new, state.arch, cached), state.topology, staged=staged)
    if not cached or not staged:
        return send_s, False
    try:
        replay_s = CostModel(state.arch, state.topology, codec=state.codec).ttft_s(new, prompt_tokens=cached)
    except TopologyError:
        return send_s, False
    return min(send_s, replay_s), replay_s < send_s


def keep_or_move(fresh: Placement, state: ClusterState, end: ClusterState, *, staged: bool) -> Placement:
    """The fresh placement where it pays or must be, else the current one.

    It pays if the tokens of the interval save more than the moves take (docs/equations.md E4.5):
    N (T_old - T_new) > D_mig.

    What moves are the current placement and its cached tokens in `state`; `end` is the state at the end of the
    interval, and a placement that will not fit by then has to go. `staged`: weights lie on every device.
    """
    if state.current is None or state.current == fresh or shortfall(state.current, end):
        return fresh
    taking_part = {state.topology.origin, *state.current.devices, *fresh.devices}
    where, context = state.topology.among(taking_part), max(1, state.context_tokens)
    try:
        both = Load.stack([load_of(p, state.arch, where, codec=state.codec) for p in (state.current, fresh)])
    except TopologyError:  # a link is down that one of them needs: that is not for planners to wait for
        return fresh
    before, after = step_cost(both, Rates.of(where, state.arch), context_tokens=context).cycle_s
    saved_s = state.interval_tokens * float(before - after)
    if not saved_s > 0 or math.isinf(after):
        return state.current
    return fresh if saved_s > moving_s(state.current, fresh, state, staged=staged)[0] else state.current
