"""One cut between two layers: the classic split of a model between an edge and the cloud."""

from __future__ import annotations

from dataclasses import dataclass

from splitray.errors import PlacementError
from splitray.placement import Placement
from splitray.planners.memory import first_fit
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import clouds, layers_on, own_edge


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
            raise PlacementError(
                "fixed_cut:P",
                expected=f"0 <= P <= {num_layers}, the layers of {state.arch.name}",
                actual=self.cut,
                remedy="cut within the model",
            )
        edge = own_edge(state)
        return first_fit(
            clouds(state),
            lambda cloud: layers_on([edge] * self.cut + [cloud] * (num_layers - self.cut), edge, cloud, state),
            state,
        )
