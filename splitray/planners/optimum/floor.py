"""A lower bound on the time of a token over every placement on any number of devices; that of bound.py is sharper.

If no sub-block is shared, one device does all of them, or a hidden state crosses at least once.

Else weigh the clocks of the devices that share a sub-block: any mean of them is no more than the latest. What goes from
holders weighed u to holders weighed v can stay on its device for no more than max(0, max u + max v - 1), so at least
(h(u) + h(v)) / 2 of it travels, with h(u) = min(1, 2 - 2 max u), which takes the quickest link's time t. Each shared
sub-block thus pays t h(u), half of it when it begins and half when its sums go on; only the first may begin without,
after copies of the embedding, which then wait for the next token. A copy is weighed as what follows it. Two weightings
say what n devices take for a sub-block that takes N on the fastest, by the bytes that it reads:

- all alike: at least N / n + t;
- in proportion to speed, whose sum is Q times the fastest one's: N / Q + t min(1, 2 - 2 / Q), or N where that is less,
  as for sets of any smaller sum the time is nowhere less than at either end.

Shapes: K kinds of sub-blocks (attention and FFN, or both as one, and the head last), D devices.
"""

import numpy as np

from splitray.arrays import Floats
from splitray.codecs import encoded_bytes
from splitray.cost import holding
from splitray.planners.layer_times import layer_times, work_alone_s
from splitray.planners.memory import ffn_unit_bytes, group_bytes, layer_bytes, table_bytes
from splitray.planners.pairs import LinkedPairs
from splitray.planners.protocol import ClusterState
from splitray.route import TOKEN_BYTES


def floor_s(state: ClusterState) -> float:
    """Seconds that a token takes at least, wherever heads, columns, rows, copies, embedding and head are."""
    arch, devices = state.arch, holding(state.topology.devices, state.arch)
    stages = work_alone_s(state, state.topology)
    layer = [stages[:, 1:-2].sum(1)] if arch.parallel_block else [stages[:, 1:-3].sum(1), stages[:, -3]]
    alone = np.array([*layer, stages[:, -2]])  # [K, D]
    attention, ffn, rows = (  # in the smallest format
        int(count * each(state).min()) for count, each in
        ((arch.num_kv_heads, group_bytes), (arch.ffn_dim, ffn_unit_bytes), (1, table_bytes))
    )  # fmt: skip
    groups, columns = arch.num_kv_heads, arch.ffn_dim
    if arch.parallel_block:
        num_bytes, pieces = [attention + ffn, rows], [groups + columns, arch.vocab]
    else:
        num_bytes, pieces = [attention, ffn, rows], [groups, columns, arch.vocab]
    times = np.array([arch.num_layers] * len(layer) + [1])
    links = LinkedPairs.of(state.topology)
    hidden = encoded_bytes(state.codec, 1, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
    cross_s, few_s = (
        float((links.on_air_s(n) + links.exchange_s + links.latency_s)[links.linked].min(initial=np.inf))
        for n in (hidden, TOKEN_BYTES)
    )
    nothing_shared = min(float(times @ alone.min(1)) + cross_s, _one_device_s(state, times @ alone))
    if not links.linked.any():
        return nothing_shared
    way = np.array([cross_s] * len(layer) + [few_s])  # of what the head finds a few bytes go on
    speed = -np.sort([-d.memory_bandwidth_bytes_per_s * d.memory_efficiency for d in devices])
    fastest = np.array(num_bytes) / speed[0]
    many = np.minimum(len(devices), pieces)
    total = np.array([speed[:n].sum() / speed[0] for n in many])

    def shared(ways: Floats) -> Floats:
        """Where `ways` is what travelling takes, [K]."""
        in_proportion = np.minimum(fastest, fastest / total + ways * np.minimum(1.0, 2 - 2 / total))
        seconds: Floats = np.maximum(fastest / many + ways, in_proportion) + min(d.launch_s for d in devices)
        return np.where(many > 1, seconds, np.inf)

    least = np.minimum(alone.min(1), shared(way))
    first = np.minimum(shared(way), shared(way / 2) + few_s)
    return min(nothing_shared, float(times @ least + (first - least).min()))


def _one_device_s(state: ClusterState, alone_s: Floats) -> float:
    """All layers and the head on one device with room for them, which take `alone_s`, [D]; infinite if none has it."""
    where, tables = state.topology, table_bytes(state)
    room = np.array([d.memory_bytes for d in where.devices]) >= state.arch.num_layers * layer_bytes(state) + tables
    if state.pinned_head is not None:
        room &= np.arange(len(room)) == where.index[state.pinned_head]
    if state.pinned_embedding is not None:
        origin, every = where.index[where.origin], np.arange(len(room))
        times = layer_times(state)
        there = times.state_s[origin, every] + times.token_s[every, origin]
        alone_s = alone_s + np.where(every == origin, 0.0, there)
    return float(alone_s[room].min(initial=np.inf))
