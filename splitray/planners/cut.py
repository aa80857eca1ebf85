"""One cut between two layers: the classic split of a model between an edge and the cloud, fixed or chosen by cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from splitray.errors import PlacementError
from splitray.placement import Placement
from splitray.planners.layer_times import layer_times
from splitray.planners.memory import first_fit, no_room, shortfall
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import clouds, layers_on, own_edge
from splitray.topology import DeviceId


@dataclass(frozen=True, slots=True)
class FixedCut:
    """Layers [0, cut) with the embedding on the edge, layers [cut, L) with the head on the cloud.

    The edge is the origin if that is one, else the first; the cloud device is the fastest that has room.
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
            clouds(state),
            lambda cloud: layers_on([edge] * self.cut + [cloud] * (num_layers - self.cut), edge, cloud, state),
            state,
        )


@dataclass(frozen=True, slots=True)
class BestCut:
    """The cut and the cloud device of the shortest decode step, among those that fit.

    `static` is the best fixed cut in 1..L-1 for the mean rates of the run, decided from `ClusterState.average`;
    otherwise one cut in 0..L for the present rates, as Neurosurgeon chooses it (ASPLOS 2017, abstract).
    """

    static: bool = False

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where a tier is missing or no cut fits into memory."""
        priced = sorted(self._cuts(state), key=lambda item: item[0])
        short: list[str] = []
        for _, layers, ends in priced:
            placement = layers_on(layers, *ends, state)
            missing = shortfall(placement, state)
            if not missing:
                return placement
            short += missing
        remedy = "split finer (planner proportional or exact), or shorten the context"
        needs = f"a need of {'; '.join(dict.fromkeys(short[:4]))}"
        raise no_room(f"room for {state.arch.name} on either side of one cut", needs, remedy)

    def _cuts(self, state: ClusterState) -> Iterator[tuple[float, list[DeviceId], tuple[DeviceId, DeviceId]]]:
        """Seconds a token, devices of the layers, and holders of embedding and head."""
        where = (state.average or state.topology) if self.static else state.topology
        times, ids, total = layer_times(state, where), where.ids, state.arch.num_layers
        edge = own_edge(state)
        served = [c for c in state.topology.tier("cloud") if where.serves(c)]
        if not self.static and not served:  # there is no cloud now, or none that the origin reaches
            ends = state.pinned_embedding or edge, state.pinned_head or edge
            yield times.chain_s(ids.index(ends[0]), [ids.index(edge)] * total, ids.index(ends[1])), [edge] * total, ends
            return
        for cloud in clouds(state):
            for cut in range(1, total) if self.static else range(total + 1):
                layers = [edge] * cut + [cloud] * (total - cut)
                ends = state.pinned_embedding or layers[0], state.pinned_head or layers[-1]
                seconds = times.chain_s(ids.index(ends[0]), [ids.index(d) for d in layers], ids.index(ends[1]))
                yield seconds, layers, ends
