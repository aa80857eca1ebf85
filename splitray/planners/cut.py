"""One cut of a model in two, which go to two devices: fixed, or chosen by cost from every cut or from the papers'."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.errors import PlacementError, listed
from splitray.placement import Placement
from splitray.planners.layer_times import LayerTimes, layer_times
from splitray.planners.memory import (
    embedding_bytes,
    first_fit,
    layer_bytes,
    model_bytes,
    no_room,
    shares_table,
    shortfall,
    table_bytes,
)
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import clouds, layers_on, own_edge
from splitray.topology import DeviceId, Topology


@dataclass(frozen=True, slots=True)
class FixedCut:
    """Layers [0, cut) with the embedding on the edge, layers [cut, L) with the head on the cloud.

    The edge is the origin if that is one, else the first; of the cloud devices with room it is the quickest.
    """

    cut: int

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where the cut lies beyond the model, or a tier is missing or full."""
        num_layers = state.arch.num_layers
        if not 0 <= self.cut <= num_layers:
            expected = f"0 <= P <= {num_layers}, the layers of {state.arch.name}"
            raise PlacementError("fixed_cut:P", expected=expected, actual=self.cut, remedy="cut within the model")
        edge = own_edge(state)
        return first_fit(
            clouds(state, first=(edge, self.cut), embedding=edge),
            lambda cloud: layers_on([edge] * self.cut + [cloud] * (num_layers - self.cut), edge, cloud, state),
            state,
        )


@dataclass(frozen=True, slots=True)
class BestCut:
    """The cut and the two devices of the shortest decode step, among those that fit; of equals the edge's cheapest.

    The pieces in order are the embedding, the layers and the head: what comes before the cut goes to one device, the
    rest to another, or all to one; pinned ends stay where they are. Any two devices may take part, in either order.

    Args:
        static: decided from the mean rates of the run (`ClusterState.average`), and not from the present ones, as
            Neurosurgeon does (ASPLOS 2017, abstract).
        paper: only cuts between layers, with the embedding on the first layer's device and the head on the last one's,
            from the user's edge to a cloud device; in 1..L-1 if static, else in 0..L.
    """

    static: bool = False
    paper: bool = False

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where a tier is missing (`paper` only) or no cut fits into memory."""
        times = layer_times(state, _average(state) if self.static else None, thrifty=True)
        if self.paper:
            return self._paper(state, times)
        found = _best_cut(state, times)
        if found is None:
            raise _no_cut(state, [f"{model_bytes(state):,} bytes, of which no two linked devices hold their parts"])
        return found

    def _paper(self, state: ClusterState, times: LayerTimes) -> Placement:
        short: list[str] = []
        for _, layers, ends in sorted(self._paper_cuts(state, times), key=lambda item: item[0]):
            placement = layers_on(layers, *ends, state)
            missing = shortfall(placement, state)
            if not missing:
                return placement
            short += missing
        raise _no_cut(state, short)

    def _paper_cuts(
        self, state: ClusterState, times: LayerTimes
    ) -> Iterator[tuple[float, list[DeviceId], tuple[DeviceId, DeviceId]]]:
        """Seconds a token, devices of the layers, and holders of embedding and head."""
        index, total, edge = state.topology.index, state.arch.num_layers, own_edge(state)
        served = [c for c in state.topology.tier("cloud") if state.topology.serves(c)]
        if not self.static and not served:  # there is no cloud now, or none that the origin reaches
            choices = [[edge] * total]
        else:
            cuts = range(1, total) if self.static else range(total + 1)
            choices = [[edge] * cut + [cloud] * (total - cut) for cloud in clouds(state) for cut in cuts]
        for layers in choices:
            ends = state.pinned_embedding or layers[0], state.pinned_head or layers[-1]
            seconds = times.chain_s(index[ends[0]], [index[d] for d in layers], index[ends[1]])
            yield seconds, layers, ends


def _best_cut(state: ClusterState, times: LayerTimes) -> Placement | None:
    """The best of all cuts between two linked devices that fit, or of one device alone; None if none does."""
    ids, total = state.topology.ids, state.arch.num_layers
    pins = [None if p is None else state.topology.index[p] for p in (state.pinned_embedding, state.pinned_head)]
    memory = np.array([d.memory_bytes for d in state.topology.devices])
    before = np.arange(total + 1)  # layers before the cut
    best: tuple[float, int, int, int] | None = None
    for a in range(len(ids)):  # rows are the second device, which is linked with the first: without one nothing crosses
        b = times.state_s.targets(a)
        e, h = a if pins[0] is None else pins[0], b if pins[1] is None else np.full(len(b), pins[1])
        seconds = before * times.layer_s[a] + (total - before) * times.layer_s[b, None]
        onto, last = times.state_s[a, b], times.state_s[b, h]
        crossing = np.repeat((times.state_s[e, a] + onto + last)[:, None], total + 1, 1)
        crossing[:, 0], crossing[:, -1] = (
            times.state_s[e, b] + last,
            times.state_s[e, a] + times.state_s[a, h],
        )
        seconds = seconds + crossing + (times.head_s[h] + times.token_s[h, e])[:, None]
        first, second, apart = _room(state, memory, a, b, e, h)
        fits = (before <= first[:, None]) & (total - before <= second[:, None])
        fits[a == b] = total <= first[a == b]
        seconds[~(fits & apart[:, None])] = np.inf
        row, cut = divmod(int(seconds.argmin()), total + 1)
        if best is None or seconds[row, cut] < best[0]:
            best = float(seconds[row, cut]), a, int(b[row]), cut
    if best is None or not np.isfinite(best[0]):
        return None
    _, a, second_device, cut = best
    return layers_on([ids[a]] * cut + [ids[second_device]] * (total - cut), ids[a], ids[second_device], state)


def _room(state: ClusterState, memory: Floats, a: int, b: Ints, e: int, h: Ints) -> tuple[Floats, Floats, Bools]:
    """Layers for which there is room on device a and on each other one, b, beside the ends' tables, [B] each.

    And whether the ends fit where no layer is. `e` holds the embedding, `h` [B] the head.
    """
    table, each = embedding_bytes(state)[e], layer_bytes(state)
    head = np.where((h == e) & shares_table(state)[e], 0, table_bytes(state)[h])
    first = memory[a] - table * (e == a) - head * (h == a)
    second = memory[b] - table * (b == e) - head * (h == b)
    fits = (memory[e] >= table + head * (h == e)) & (memory[h] >= head + table * (h == e))
    return np.floor(first / each[a]), np.floor(second / each[b]), fits


def _average(state: ClusterState) -> Topology | None:
    """The mean rates of the devices that are there; None if they are not known."""
    return None if state.average is None else state.average.among(state.topology.ids)


def _no_cut(state: ClusterState, short: list[str]) -> PlacementError:
    remedy = "split finer (planner proportional or exact), or shorten the context"
    needs = f"a need of {'; '.join(dict.fromkeys(short[:4]))}"
    there = listed([f"{d.memory_bytes:,.0f} bytes on {d.id}" for d in state.topology.devices])
    return no_room(f"room for {state.arch.name} on either side of one cut ({there})", needs, remedy)
