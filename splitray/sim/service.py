"""How long a request of mean length takes alone, and the rate of arrivals that follows where none is given."""

import numpy as np

from splitray.arch import ModelArch
from splitray.cost import CostModel, Rates, load_of, step_cost
from splitray.errors import PlacementError
from splitray.planners import ClusterState, make_planner
from splitray.topology import Topology

MEAN_PROMPT, MEAN_OUTPUT = 128, 64  # tokens of a request where nothing else is said
_LOAD = 0.2  # of the best device's rate, by default
_CROWD_LOAD = 0.8  # of a shared cloud under cloud_only, as policies are trained with


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


def shared_rate_per_s(arch: ModelArch, topology: Topology) -> float:
    """The rate of all edges together at which cloud_only would keep a shared cloud busy for 0.8 of the time.

    Where no cloud device holds the model, that is reckoned for the best placement; if that leaves the cloud alone, the
    edges ask as if they were alone.
    """
    state = ClusterState(arch=arch, topology=topology, context_tokens=MEAN_PROMPT + MEAN_OUTPUT)
    try:
        placement = make_planner("cloud_only").propose(state)
    except PlacementError:
        placement = make_planner("exact").propose(state)
    where = topology.among({topology.origin, *placement.devices})
    load, rates = load_of(placement, arch, where), Rates.of(where, arch)
    cloud = np.array([d.tier == "cloud" for d in where.devices])
    token = step_cost(load, rates, context_tokens=MEAN_PROMPT + MEAN_OUTPUT / 2).busy_s[0, cloud].max(initial=0.0)
    prompt = (
        step_cost(load, rates, context_tokens=MEAN_PROMPT, new_tokens=MEAN_PROMPT).busy_s[0, cloud].max(initial=0.0)
    )
    busy_s = float(prompt + (MEAN_OUTPUT - 1) * token)
    return _CROWD_LOAD / busy_s if busy_s > 0 else default_rate_per_s(arch, topology)
