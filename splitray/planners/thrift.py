"""The quickest of placements and, of equally quick ones, the one that costs the edge devices less energy."""

from splitray.cost import CostModel
from splitray.placement import Placement
from splitray.planners.protocol import ClusterState, equal_s_per_joule


def thrifty_s(placement: Placement, state: ClusterState) -> float:
    """Predicted seconds a token, and so little for the edge's energy that it decides between equals only.

    Raises:
        TopologyError: two devices that must exchange have no link.
    """
    cost = CostModel(state.arch, state.topology, codec=state.codec)
    step = cost.decode(placement, context_tokens=max(1, state.context_tokens))
    edge = [d.tier == "edge" for d in state.topology.devices]
    joule = float(step.energy_j(state.topology)[0, edge].sum())
    return float(step.cycle_s[0]) + equal_s_per_joule(state.topology) * joule
