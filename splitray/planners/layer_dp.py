"""EdgeShard: which devices, and which contiguous layers on each, by dynamic programming (arXiv 2405.14371).

The recursion is the standard one of a linear partition (docs/equations.md E5.1, inferred from the abstract): the best
way to have layers 0..l done with the last of them on device j. The first layers start from the origin, as the data
does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from splitray.placement import Placement
from splitray.planners.layer_times import LayerTimes, layer_bytes, layer_times, table_bytes
from splitray.planners.memory import fastest_first, model_bytes, no_room
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import layers_on

MOST_DEVICES = 8  # more are left out, slowest first: the states are sets of devices


@dataclass(frozen=True, slots=True)
class LayerDp:
    """The contiguous shards of the least time a token or, with `throughput`, of the shortest slowest stage.

    Each device holds at most one shard that fits its memory with its KV. Exact in this action space up to
    `MOST_DEVICES` devices, beyond which the slowest are not used.
    """

    throughput: bool = False

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no sequence of shards fits."""
        ids, origin = state.topology.ids, state.topology.origin
        fastest = [d for d in fastest_first(state.topology.devices) if d != origin]
        used = [origin, *fastest[: MOST_DEVICES - 1]]
        chosen = best_shards(layer_times(state), state, [ids.index(d) for d in used], throughput=self.throughput)
        if chosen is None:
            needs = f"a need of {model_bytes(state):,} bytes that no such shards meet"
            remedy = "add memory, shorten the context, or use the planner proportional"
            raise no_room(f"contiguous shards of {state.arch.name} on some of {used}", needs, remedy)
        layers = [ids[d] for d in chosen]
        return layers_on(layers, origin, layers[-1], state)


def caps(state: ClusterState, device: int) -> tuple[int, int]:
    """How many layers fit on a device, and how many with the head on it; -1 where not even the head does."""
    arch, one = state.arch, state.topology.devices[device]
    table = table_bytes(state)
    is_origin = one.id == state.topology.origin
    left = one.memory_bytes - table * is_origin
    left -= table * (state.pinned_head == one.id and not (arch.tied_embeddings and is_origin))
    head = 0 if state.pinned_head or (arch.tied_embeddings and is_origin) else table
    return int(left // layer_bytes(state)), int((left - head) // layer_bytes(state))


def best_shards(times: LayerTimes, state: ClusterState, used: list[int], *, throughput: bool) -> list[int] | None:
    """The device of each layer, or None if nothing fits.

    `used` are indices of the devices that may hold a shard, the origin first; `throughput` minimises the slowest stage
    (a shard or a transfer) and not the sum.
    """
    num_layers, n = state.arch.num_layers, len(used)
    origin, pinned = used[0], None if state.pinned_head is None else state.topology.ids.index(state.pinned_head)
    join = np.maximum if throughput else np.add
    best = np.full((num_layers + 1, 1 << n, n), np.inf)
    came: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    limits = [caps(state, d) for d in used]
    masks = np.arange(1 << n)

    def lengths(j: int, done: int) -> Iterator[int]:
        """Layers that may follow `done` others on a device; the last shard leaves room for the head."""
        left = num_layers - done
        return (x for x in range(1, left + 1) if x <= limits[j][x == left])

    for j, device in enumerate(used):
        for length in lengths(j, 0):
            shard = length * times.layer_s[device]
            if np.isfinite(way := times.state_s[origin, device]):
                best[length, 1 << j, j] = join(way, shard)
    for done in range(1, num_layers):
        for j, device in enumerate(used):
            fresh = masks[(masks >> j) & 1 == 0]
            arrive = np.full((len(fresh), n), np.inf)
            for k, source in enumerate(used):
                if k != j:
                    arrive[:, k] = join(best[done, fresh, k], times.state_s[source, device])
            previous = arrive.argmin(1)
            least = arrive.min(1)
            if not np.isfinite(least).any():
                continue
            for length in lengths(j, done):
                total = join(least, length * times.layer_s[device])
                target = best[done + length, fresh | (1 << j), j]
                for row in np.flatnonzero(total < target):
                    mask = int(fresh[row])
                    best[done + length, mask | (1 << j), j] = total[row]
                    came[done + length, mask | (1 << j), j] = (done, mask, int(previous[row]))
    finished: list[tuple[float, int, int]] = []
    for j, device in enumerate(used):
        head = device if pinned is None else pinned
        end = join(join(times.state_s[device, head], times.head_s[head]), times.token_s[head, origin])
        for mask in range(1 << n):
            value = float(join(best[num_layers, mask, j], end))
            if np.isfinite(value):
                finished.append((value, mask, j))
    if not finished:
        return None
    _, mask, j = min(finished)
    layers: list[int] = []
    done = num_layers
    while done:
        start, before, k = came.get((done, mask, j), (0, 0, 0))
        layers = [used[j]] * (done - start) + layers
        done, mask, j = start, before, k
    return layers
