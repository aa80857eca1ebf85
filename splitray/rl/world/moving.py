"""What going from one choice to another costs, as `sim/arena.py` charges it: send the KV, or replay its tokens.

Shapes: N instances; directions (edge to cloud, cloud to edge) are an axis of length 2.
"""

import numpy as np

from splitray.arrays import Bools, Floats
from splitray.cost import Rates, prompt_s, step_cost
from splitray.rl.grid.choice import Choice
from splitray.rl.grid.grid import Grid
from splitray.rl.world.cell import References

_MOST_S_PER_BYTE = 1e3  # in an outage: finite, so that a program may still compare


def _links(rates: Rates) -> Floats:
    return np.stack([rates.link_bytes_per_s[:, 0, 1], rates.link_bytes_per_s[:, 1, 0]], axis=1)


def s_per_byte(rates: Rates, cloud_free: Floats, known: References) -> Floats:
    """What a byte of KV costs each way for a program that adds up over layers, [N, 2].

    Sent, or replayed in the new place where that is quicker for the whole cache: a replay's time is spread over the
    bytes that it saves.
    """
    with np.errstate(divide="ignore"):
        sent = 1 / _links(rates)
    edge = np.full(len(cloud_free), known.edge.prompt_s)
    replay_s = np.stack([known.cloud.prompt_s / cloud_free, edge], axis=1)
    cache_bytes = known.request.prompt_tokens * max(known.edge.kv_bytes_per_token, known.cloud.kv_bytes_per_token)
    return np.minimum(np.minimum(sent, replay_s / cache_bytes), _MOST_S_PER_BYTE)


def way_s(grid: Grid, old: Choice, new: Choice, rates: Rates, cached_tokens: Floats) -> tuple[Floats, Bools]:
    """Seconds until the new choice generates, infinite over a link that is down, and whether by replaying, [N] each."""
    num_bytes = grid.move_bytes(old, new, cached_tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(num_bytes > 0, num_bytes / _links(rates), 0.0)
    fixed = rates.latency_s[:, 0, 1] + rates.exchange_s[:, 0, 1]
    send_s = each.max(1) + np.where((num_bytes > 0).any(1), fixed, 0.0)
    tokens, load = np.maximum(cached_tokens, 1), grid.load(new)
    step = step_cost(load, rates, context_tokens=tokens, new_tokens=tokens)
    replay_s = np.where(cached_tokens > 0, step.origin_s + prompt_s(load, rates, tokens), np.inf)
    return np.minimum(send_s, replay_s), replay_s < send_s
