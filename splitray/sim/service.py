"""How long a request of mean length takes alone, and the rate of arrivals that follows where none is given."""

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.errors import PlacementError
from splitray.planners import ClusterState, make_planner
from splitray.topology import Topology

MEAN_PROMPT, MEAN_OUTPUT = 128, 64  # tokens of a request where nothing else is said
_LOAD = 0.2  # of the best device's rate, by default


def service_s(arch: ModelArch, topology: Topology, planner: str = "best_device") -> float:
    """Seconds that a request of mean length takes alone, under a planner's placement."""
    state = ClusterState(arch=arch, topology=topology, context_tokens=MEAN_PROMPT + MEAN_OUTPUT)
    placement = make_planner(planner).propose(state)
    cost = CostModel(arch, topology)
    later = (MEAN_OUTPUT - 1) * cost.tpot_s(placement, context_tokens=MEAN_PROMPT + MEAN_OUTPUT / 2)
    return cost.ttft_s(placement, prompt_tokens=MEAN_PROMPT) + later


def default_rate_per_s(arch: ModelArch, topology: Topology) -> float:
    """0.2 of the rate at which the best device serves requests; of the best placement where none holds the model."""
    try:
        return _LOAD / service_s(arch, topology)
    except PlacementError:
        return _LOAD / service_s(arch, topology, "exact")
