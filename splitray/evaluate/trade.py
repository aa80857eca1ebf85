"""The Lyapunov weight V over three decades: what it saves and what it makes wait."""

import numpy as np
from matplotlib.figure import Figure

from splitray.catalog import architecture
from splitray.evaluate.traces import mean_of, simulated
from splitray.report.document import Table
from splitray.report.plots import trade_plot
from splitray.sim.arena import Case
from splitray.sim.arena import run as simulate
from splitray.sim.network import arrivals
from splitray.sim.scenario import Scenario
from splitray.sim.service import service_s
from splitray.topology import Topology

SWEEP = (1.0, 10.0, 100.0, 1000.0)
SLOTS = 1200


def trade_of_v(seed: int) -> tuple[Table, Figure]:
    """V over three decades: a frugal phone that the load exceeds, and a hungrier board that is quicker."""
    slots, arch = SLOTS, architecture("gpt2-xl")
    where = Topology.pair("galaxy-s23", "jetson-orin-nx-8gb", link="wifi6")
    rate = 0.9 / service_s(arch, where)
    line = arrivals(None, slots, rate, np.random.default_rng(seed))
    scenario = Scenario(name="trade", arch=arch, topology=where, requests=line, num_slots=slots)
    cases = [Case(planner=f"drift_plus_penalty:{v:g}", scenario=scenario, every=2) for v in SWEEP]
    found = simulate(cases, drain=False)
    energy = [o.energy_j_per_request for o in found]
    backlog = [float(o.backlog_tokens.mean()) for o in found]
    above = [e - min(energy) for e in energy]
    rows = tuple(
        (f"{v:g}", simulated(e, "J"), simulated(a, "J"), simulated(b, "tokens"), simulated(t, "s"))
        for v, e, a, b, t in zip(SWEEP, energy, above, backlog, [mean_of(o, "latency_s") for o in found], strict=True)
    )
    most = max(a * v for a, v in zip(above, SWEEP, strict=True))
    steepest = float(np.max(np.diff(np.log(backlog)) / np.diff(np.log(SWEEP))))
    table = Table(
        "The trade of V (drift_plus_penalty)",
        ("V", "energy of a request", "above the least", "mean backlog", "mean latency"),
        rows,
        "GPT-2 XL on a Galaxy S23 and an Orin NX 8 GB over WiFi 6, 0.9 of the Jetson's capacity. At every V the energy "
        f"is at most {most:.3g} J / V above the least; the backlog grows like V^{steepest:.2f} at most.",
    )
    return table, trade_plot(SWEEP, energy, backlog)
