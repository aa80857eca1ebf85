"""Write a planner and see how it does beside others, under a virtual clock on a link whose rate changes.

Run: python examples/compare_planners.py
"""

import numpy as np

from splitray.catalog import architecture
from splitray.placement import Placement
from splitray.planners import ClusterState, make_planner
from splitray.sim.arena import Case, run
from splitray.sim.network import links_varied
from splitray.sim.scenario import Scenario, edge_cloud_links
from splitray.sim.workload import poisson
from splitray.topology import Topology

TOPOLOGY = "clusters/topology-catalog.yaml"
LINKS = "log_ar1:0.8+gilbert_elliott"  # a rate that wanders, and outages of some seconds
SLOTS = 120


class CloudWhileThere:
    """Ours for this example: the cloud while its link carries at least 1 MB/s, else the edge."""

    def propose(self, state: ClusterState) -> Placement:
        """The one thing that a planner does."""
        link = state.topology.link(state.topology.origin, state.topology.tier("cloud")[0])
        there = link is not None and link.bandwidth_bytes_per_s >= 1e6  # an outage has no link
        return make_planner("cloud_only" if there else "edge_only").propose(state)


def main() -> None:
    """Two minutes of requests for each planner, the same ones on the same links."""
    rng = np.random.default_rng(0)
    topology = Topology.load(TOPOLOGY)
    links = links_varied(LINKS, topology, edge_cloud_links(topology), SLOTS, 1.0, rng, what="bandwidth")
    scenario = Scenario(
        name="example", arch=architecture("gpt2-xl"), topology=topology, num_slots=SLOTS,
        requests=poisson(0.2, SLOTS, prompt_tokens=64, output_tokens=32, rng=rng), bandwidth_bytes_per_s=links,
    )  # fmt: skip
    planners = ["edge_only", "cloud_only", "layer_cut", CloudWhileThere()]
    for outcome in run([Case(planner=p, scenario=scenario) for p in planners]):
        figures = outcome.document()
        mean, worst = figures["latency_s"]["mean"], figures["latency_s"]["p99"]
        print(f"{outcome.planner:>15}: {mean:.2f} s a request, {worst:.2f} s for the slowest of 100 (simulated)")


if __name__ == "__main__":
    main()
