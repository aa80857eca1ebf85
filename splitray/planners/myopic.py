"""Head-level partitioning from what is available now, with migration charged (Kafetzis et al., arXiv 2505.02533).

Head groups go one by one to the device on which they are done first, given the load and the memory already placed there
(the remaining-capacity score of docs/equations.md E4.R in seconds); the FFN with the output projection's sum stays
whole, as in the released code. A layer that finds no place backtracks into the layer before. That code scores total
capacity, never backtracks and never charges migration (K6, K8); those three are corrected here. Ours beyond the paper:
for each holder of the FFN several sets of devices for the heads are tried, and the clock of the layer decides. The
released scores are in scored.py, and the planner that starts from elsewhere too and may share every piece is in
myopic_search.py.

Shapes: C candidates (holder of the FFN by number of devices for the heads), D devices, F of them for heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.layer_times import work_alone_s
from splitray.planners.memory import (
    embedding_bytes,
    ffn_unit_bytes,
    group_bytes,
    model_bytes,
    no_room,
    shares_table,
    table_bytes,
)
from splitray.planners.pairs import LinkedPairs, PairSeconds
from splitray.planners.pay_back import keep_or_move
from splitray.planners.protocol import ClusterState

_HOLDERS = 8  # devices that may take a layer's FFN: those that have done it first, if the heads were done at once
_WIDTHS = 8  # devices that share the heads of a layer: the quickest, or those after the very quickest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Seconds: one head group, an FFN, the head and the fixed cost of a sub-block [D]; of a hidden state by pair."""

    group_s: Floats
    ffn_s: Floats
    head_s: Floats
    launch_s: Floats
    busy_s: PairSeconds
    latency_s: PairSeconds
    way_s: PairSeconds  # both


def _times(state: ClusterState) -> _Times:
    where, arch, links = state.topology, state.arch, LinkedPairs.of(state.topology)
    seconds, launch = work_alone_s(state, where), np.array([d.launch_s for d in where.devices])
    attention = seconds[:, 1] - launch if not arch.parallel_block else seconds[:, 1] * 0
    ffn = seconds[:, 1:-2].sum(1) - attention - launch * (1 if arch.parallel_block else 2)
    busy = links.on_air_s(arch.hidden_dim * arch.dtype_bytes) + links.exchange_s
    return _Times(
        group_s=attention / arch.num_kv_heads,
        ffn_s=ffn,
        head_s=seconds[:, -2],
        launch_s=launch,
        busy_s=links.times(busy),
        latency_s=links.times(links.latency_s),
        way_s=links.times(busy + links.latency_s),
    )


@dataclass(frozen=True, slots=True)
class Myopic:
    """A placement for the next interval from the present rates alone.

    Args:
        backtrack_limit: layers that may be taken back before the instance counts as infeasible.
        staged: weights lie on every device, so that only the KV moves.
    """

    backtrack_limit: int = 200
    staged: bool = True

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; keeps the current placement where moving does not pay within the interval.

        Memory is checked at the end of the interval (E4.8). Fails where backtracking finds no place.
        """
        end = replace(state, context_tokens=state.context_tokens + state.interval_tokens)
        fresh = self._place(end)
        if fresh is None:
            expected = f"room for head groups and FFNs of {state.arch.name} at the end of the interval"
            needs = f"a need of {model_bytes(end):,} bytes, no place within {self.backtrack_limit} steps back"
            raise no_room(expected, needs, "add memory or a device, or shorten the context")
        return keep_or_move(fresh, state, end, staged=self.staged)

    def _place(self, state: ClusterState) -> Placement | None:
        arch, where = state.arch, state.topology
        times = _times(state)
        left = np.array([d.memory_bytes for d in where.devices], float)
        ends = ends_of(state, times.head_s, left)
        if ends is None:
            return None
        embedding, head = ends
        sizes = group_bytes(state).astype(float), arch.ffn_dim * ffn_unit_bytes(state).astype(float)
        layers: list[tuple[Ints, int]] = []
        options: list[Iterator[tuple[Ints, int]]] = []
        known: dict[tuple[int, int | None], tuple[Ints, int]] = {}
        steps_back = 0
        while len(layers) < arch.num_layers:
            residual = layers[-1][1] if layers else embedding
            after = head if len(layers) == arch.num_layers - 1 else None
            if len(options) == len(layers):
                options.append(
                    _layer_options(times, left, sizes, arch.num_kv_heads, residual, after, known.get((residual, after)))
                )
            chosen = next(options[-1], None)
            if chosen is not None:
                known[residual, after] = chosen
                layers.append(chosen)
                left = left - _taken(chosen, sizes)
                continue
            options.pop()
            steps_back += 1
            if not layers or steps_back > self.backtrack_limit:
                return None
            left = left + _taken(layers.pop(), sizes)
        built: dict[tuple[bytes, int], LayerPlacement] = {}
        for counts, ffn in layers:
            if (key := (counts.tobytes(), ffn)) not in built:
                edges = np.concatenate([[0], np.cumsum(counts)]).tolist()
                heads = {str(d): [(edges[i], edges[i + 1])] for i, d in enumerate(where.ids)}
                built[key] = LayerPlacement(Shares.of(heads), Shares.whole(arch.ffn_dim, where.ids[ffn]))
        found = [built[counts.tobytes(), ffn] for counts, ffn in layers]
        return Placement(tuple(found), (where.ids[embedding],), Shares.whole(arch.vocab, where.ids[head]))


def _taken(layer: tuple[Ints, int], sizes: tuple[Floats, Floats]) -> Floats:
    counts, ffn = layer
    taken = counts.astype(np.float64) * sizes[0]
    taken[ffn] += sizes[1][ffn]
    return taken


def ends_of(state: ClusterState, head_s: Floats, left: Floats) -> tuple[int, int] | None:
    """Devices of embedding and head, None without room; takes their memory off `left`.

    Unpinned ends stay together, where the head is fastest.
    """
    ids, table = state.topology.ids, table_bytes(state)
    pins = [None if p is None else state.topology.index[p] for p in (state.pinned_embedding, state.pinned_head)]
    apart = np.array([not state.topology.serves(d) for d in ids])  # the origin does not reach them now
    for head in [pins[1]] if pins[1] is not None else [int(i) for i in np.lexsort((head_s, apart))]:
        embedding = head if pins[0] is None else pins[0]
        need = np.zeros(len(ids))
        need[embedding] += embedding_bytes(state)[embedding]
        need[head] += 0 if embedding == head and shares_table(state)[head] else table[head]
        if (need <= left).all():
            left -= need
            return embedding, head
    return None


def _layer_options(
    times: _Times,
    left: Floats,
    sizes: tuple[Floats, Floats],
    num_groups: int,
    residual: int,
    after: int | None,
    known: tuple[Ints, int] | None,
) -> Iterator[tuple[Ints, int]]:
    """Feasible ways to place one layer, quickest first: head groups by device, and the holder of the FFN.

    `residual` holds the input; the output goes on to `after` if that is known. `known` was the choice of an earlier
    layer of the same kind, and still is the quickest if there is room for it.
    """
    if known is not None and (_taken(known, sizes) <= left).all():
        yield known
    every, way = np.arange(len(left)), times.way_s
    near = way[residual, every] + times.ffn_s + (way[every, after] if after is not None else 0.0)
    able = np.flatnonzero(left >= sizes[1])
    holders = np.sort(able[np.argsort(near[able], kind="stable")[:_HOLDERS]])
    widths = [(skip, skip + w) for skip in (0, 1) for w in range(1, min(len(every) - skip, _WIDTHS) + 1)]
    if not len(holders):
        return
    ffn = np.repeat(holders, len(widths))
    alone = way[residual, every] + times.launch_s + times.group_s + way[every, holders[:, None]]
    rank = np.argsort(np.argsort(alone, axis=1, kind="stable"), axis=1)
    few = np.flatnonzero((rank <= _WIDTHS).any(0))  # F devices, who alone may get heads
    alone, rank = (np.repeat(each[:, few], len(widths), axis=0) for each in (alone, rank))
    first, last = np.tile(widths, (len(holders), 1)).T
    allowed = (rank >= first[:, None]) & (rank < last[:, None])
    room = left[few] - np.where(few == ffn[:, None], sizes[1][few], 0.0)
    most = np.where(allowed, np.floor(room / sizes[0][few]), 0)
    counts = np.zeros(alone.shape, np.int64)
    done = alone.copy()
    rows = np.arange(len(ffn))
    for _ in range(num_groups):
        score = np.where(counts < most, done, np.inf)
        best = score.argmin(1)
        ok = np.isfinite(score[rows, best])
        counts[rows[ok], best[ok]] += 1
        done[rows[ok], best[ok]] += times.group_s[few[best[ok]]]
    seconds = _layer_s(times, few, counts, ffn, residual) + (way[ffn, after] if after is not None else 0.0)
    seconds = np.where(counts.sum(1) == num_groups, seconds, np.inf)
    for row in np.argsort(seconds, kind="stable"):
        if not np.isfinite(seconds[row]):
            return
        chosen = np.zeros(len(every), np.int64)
        chosen[few] = counts[row]
        yield chosen, int(ffn[row])


def _layer_s(times: _Times, few: Ints, counts: Ints, ffn: Ints, residual: int) -> Floats:
    """The clock of one layer, [C], from heads by device [C, F]: in device order sends share the uplink.

    Receipts share the downlink likewise.
    """
    used = counts > 0
    sent = np.cumsum(np.where(used, times.busy_s[residual, few], 0.0), axis=1) + times.latency_s[residual, few]
    sent[:, few == residual] = 0.0
    clock = np.where(used, sent + times.launch_s[few] + counts * times.group_s[few], 0.0)
    here = few == ffn[:, None]
    ready, free = np.where(here, clock, 0.0).sum(1), np.zeros(len(ffn))
    for at, d in enumerate(few):
        busy = times.busy_s[d, ffn]
        sends = used[:, at] & (ffn != d)
        end = np.maximum(clock[:, at] + busy, free + busy)
        free = np.where(sends, end, free)
        ready = np.where(sends, np.maximum(ready, end + times.latency_s[d, ffn]), ready)
    return ready + times.launch_s[ffn] + times.ffn_s[ffn]
