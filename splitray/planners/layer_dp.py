"""EdgeShard: which devices, and which contiguous layers on each, by dynamic programming (arXiv 2405.14371).

Layers are alike, so that a chain of shards costs its way through the devices (docs/equations.md E5.1, inferred from
the abstract) plus its layers, wherever they stand in it: a dynamic program over sets of devices finds the shortest way
through each set, and layers go to the fastest of the set that have room. Embedding and head may be on any device.

Shapes: E devices of the embedding, M sets of devices, n devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.errors import listed
from splitray.placement import Placement
from splitray.planners.layer_times import LayerTimes, layer_times
from splitray.planners.memory import (
    embedding_bytes,
    fastest_first,
    layer_bytes,
    model_bytes,
    no_room,
    shares_table,
    table_bytes,
)
from splitray.planners.protocol import EQUAL, ClusterState
from splitray.planners.whole import layers_on

MOST_DEVICES = 8  # more are left out: the states are sets of devices


@dataclass(frozen=True, slots=True)
class LayerDp:
    """The contiguous shards of the least time a token or, with `throughput`, of the shortest slowest stage.

    Each device holds at most one shard that fits its memory with its KV. Exact in this action space up to
    `MOST_DEVICES` devices, of which more than these are used if they are the fastest or, where those have no room, the
    largest. Of equally quick ones it is the one that costs the edge less energy.

    Args:
        throughput: the slowest stage (a shard, a transfer or the head) counts first, and the sum among equals.
        paper: the embedding is on the origin, where data starts, and the head on the last shard's device.
    """

    throughput: bool = False
    paper: bool = False

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no sequence of shards fits."""
        ids, times = state.topology.ids, layer_times(state, thrifty=True)
        chosen = None
        for used in _used(state):
            chosen = best_shards(times, state, used, throughput=self.throughput, paper=self.paper)
            if chosen is not None:
                return layers_on([ids[d] for d in chosen.layers], ids[chosen.embedding], ids[chosen.head], state)
        needs = f"a need of {model_bytes(state):,} bytes that no such shards meet"
        remedy = "add memory, shorten the context, or use the planner proportional"
        raise no_room(f"contiguous shards of {state.arch.name} on some of {listed(ids)}", needs, remedy)


def _used(state: ClusterState) -> list[list[int]]:
    """Devices to try, the origin first: all, or of many the fastest, then the largest."""
    index, origin = state.topology.index, state.topology.origin
    fastest = [index[d] for d in fastest_first(state.topology.devices) if d != origin]
    if len(index) <= MOST_DEVICES:
        return [[index[origin], *fastest]]
    largest = sorted(fastest, key=lambda d: -state.topology.devices[d].memory_bytes)
    return [[index[origin], *few[: MOST_DEVICES - 1]] for few in (fastest, largest)]


@dataclass(frozen=True, slots=True)
class Chain:
    """The device of each layer, and those of embedding and head."""

    embedding: int
    layers: list[int]
    head: int


def caps(state: ClusterState, used: Sequence[int], embedding: int, head: int) -> Ints | None:
    """How many layers fit on each of some devices beside the ends, [n]; None where an end does not fit."""
    devices = state.topology.devices
    left = {d: devices[d].memory_bytes for d in {*used, embedding, head}}
    left[embedding] -= embedding_bytes(state)[embedding]
    left[head] -= 0 if embedding == head and shares_table(state)[head] else table_bytes(state)[head]
    if min(left[embedding], left[head]) < 0:
        return None
    many, each = state.arch.num_layers, layer_bytes(state)
    return np.array([min(many, int(left[d] // each[d])) for d in used])


def best_shards(
    times: LayerTimes, state: ClusterState, used: list[int], *, throughput: bool = False, paper: bool = False
) -> Chain | None:
    """The best chain over some devices, or None if nothing fits; see `LayerDp`.

    `used` are indices of the devices that may hold something, the origin first.
    """
    n = len(used)
    pins = [None if p is None else state.topology.index[p] for p in (state.pinned_embedding, state.pinned_head)]
    embeddings = [pins[0] if pins[0] is not None else used[0]] if paper or pins[0] is not None else list(used)
    heads = used if pins[1] is None else [pins[1]]
    search = _Shards(times, state, used, embeddings)
    ends = [
        (i, e, h, limits)
        for i, e in enumerate(embeddings)
        for h in heads
        if (limits := caps(state, used, e, h)) is not None
    ]

    def last(head: int) -> Ints:
        """Who may hold the last shard."""
        return np.flatnonzero(np.array(used) == head) if paper and pins[1] is None else np.arange(n)

    most = np.inf
    if throughput:
        ways, _ = search.ways(np.maximum, np.inf)
        for i, e, h, limits in ends:
            stage = np.maximum(ways[i] + 0.0, times.state_s[used, h])
            stage = np.maximum(stage, max(times.head_s[h], times.token_s[h, e]))
            stage = np.maximum(stage, search.slowest(limits)[:, None])[:, last(h)]
            most = min(most, float(stage.min()) * (1 + EQUAL))
        if not np.isfinite(most):
            return None
    ways, came = search.ways(np.add, most)
    best: tuple[float, int, int, int, Ints] | None = None
    for i, e, h, limits in ends:
        if max(times.head_s[h], times.token_s[h, e]) > most:
            continue
        if throughput:
            limits = np.minimum(limits, np.floor(most / times.layer_s[used] * (1 + EQUAL)).astype(int))
        onto = times.state_s[used, h]
        total = ways[i] + np.where(onto <= most, onto, np.inf) + (times.head_s[h] + times.token_s[h, e])
        total = (total + search.filled(limits)[0][:, None])[:, last(h)]
        at = int(total.argmin())
        if np.isfinite(total.flat[at]) and (best is None or total.flat[at] < best[0]):
            row, column = divmod(at, total.shape[1])
            best = float(total.flat[at]), i, h, row * n + int(last(h)[column]), limits
    if best is None:
        return None
    _, i, h, at, limits = best
    mask, j = divmod(at, n)
    counts, order = search.filled(limits)[1][mask], []
    while mask:
        order.append(j)
        mask, j = mask ^ (1 << j), int(came[i, mask, j])
    return Chain(embeddings[i], [used[j] for j in reversed(order) for _ in range(counts[j])], h)


class _Shards:
    """Ways through sets of devices, and layers dealt to a set; a set is a mask of positions in `used`."""

    def __init__(self, times: LayerTimes, state: ClusterState, used: list[int], embeddings: list[int]) -> None:
        self.num_layers, self.used, n = state.arch.num_layers, used, len(used)
        self.layer_s = times.layer_s[used]
        self.start_s, self.state_s = times.state_s[np.ix_(embeddings, used)], times.state_s[np.ix_(used, used)]
        self.inside = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1 == 1  # [M, n]
        self.sizes = self.inside.sum(1)

    def ways(self, join: np.ufunc, most: float) -> tuple[Floats, Ints]:
        """The cheapest way from each embedding through each set to its last device, [E, M, n], and the one before it.

        No single transfer takes longer than `most`.
        """
        n = len(self.used)
        start, onto = (np.where(s <= most, s, np.inf) for s in (self.start_s, self.state_s))
        value = np.full((len(start), 1 << n, n), np.inf)
        came = np.zeros(value.shape, np.int64)
        for j in range(n):
            value[:, 1 << j, j] = start[:, j]
        for size in range(2, n + 1):
            for j in range(n):
                masks = np.flatnonzero((self.sizes == size) & self.inside[:, j])
                arrive = join(value[:, masks ^ (1 << j)], onto[:, j])  # [E, m, n]
                came[:, masks, j], value[:, masks, j] = arrive.argmin(2), arrive.min(2)
        return value, came

    def filled(self, limits: Ints) -> tuple[Floats, Ints]:
        """The least time of all layers on each set, [M], and how many each device takes, [M, n]: at least one."""
        able = self.inside & (limits > 0)
        counts = np.where(able, 1, 0)
        left = self.num_layers - self.sizes
        for j in np.argsort(self.layer_s, kind="stable"):
            more = np.clip(np.minimum(limits[j] - 1, left), 0, None) * able[:, j]
            counts[:, j] += more
            left = left - more
        good = (able == self.inside).all(1) & (left == 0) & (self.sizes > 0)
        return np.where(good, counts @ self.layer_s, np.inf), counts

    def slowest(self, limits: Ints) -> Floats:
        """The least that the slowest shard of each set can take, [M]."""
        steps = np.unique(np.outer(self.layer_s, np.arange(1, self.num_layers + 1)))
        below, above = np.zeros(len(self.sizes), np.int64), np.full(len(self.sizes), len(steps))
        while (below < above).any():  # the first of the steps with room for all layers
            middle = (below + above) // 2
            within = steps[np.minimum(middle, len(steps) - 1), None]
            room = np.minimum(limits, np.floor(within / self.layer_s * (1 + EQUAL)).astype(int)) * self.inside
            enough = (room.sum(1) >= self.num_layers) & ((room > 0) | ~self.inside).all(1)
            open_ = below < above
            below, above = np.where(open_ & ~enough, middle + 1, below), np.where(open_ & enough, middle, above)
        possible = (below < len(steps)) & (self.sizes > 0) & (self.sizes <= self.num_layers)
        return np.where(possible, steps[np.minimum(below, len(steps) - 1)], np.inf)
