"""How fast the virtual clock runs on this machine: the suite `simulator` of `splitray bench`."""

import time
from typing import Any

import numpy as np

from splitray.catalog import architecture
from splitray.cost import CostModel, Load, Rates, load_of
from splitray.planners import ClusterState, make_planner
from splitray.sim.arena import Case, run
from splitray.sim.scenario import Scenario, background_load, random_cluster
from splitray.sim.simulator import Simulator
from splitray.sim.workload import Requests, poisson
from splitray.topology import Topology

_STEPS = 100


def slots_per_s(num_instances: int, *, seed: int = 0) -> float:
    """Environment slots a second of LLaMA-7B's 32 layers on two devices, random placements given."""
    where = Topology.pair("jetson-orin-nx-16gb", link="gigabit-lan")
    arch, rng = architecture("llama-7b"), np.random.default_rng(seed)
    state = ClusterState(arch=arch, topology=where, context_tokens=512)
    planner = make_planner("random", seed=seed)
    load = Load.stack([load_of(planner.propose(state), arch, where) for _ in range(num_instances)])
    rates = Rates.stack([Rates.of(where, arch)] * num_instances)
    simulator = Simulator(where, [poisson(0.05, 1e4, rng=rng) for _ in range(num_instances)])
    simulator.step(load, rates)
    started = time.perf_counter()
    for _ in range(_STEPS):
        simulator.step(load, rates)
    return num_instances * _STEPS / (time.perf_counter() - started)


def many_devices(num_devices: int, num_tokens: int, *, seed: int = 0) -> dict[str, float]:
    """LLaMA-7B on random devices (5-50 GFLOPS, 1-10 Gbit/s, up to 30 % other work), `myopic:paper` at every token."""
    rng, arch = np.random.default_rng(seed), architecture("llama-7b")
    where = random_cluster(rng, num_devices, (1e9, 8e9))
    state = ClusterState(arch=arch, topology=where, context_tokens=num_tokens)
    placement = make_planner("myopic:paper").propose(state)
    slot_s = CostModel(arch, where).tpot_s(placement, context_tokens=num_tokens)
    slots = int(1.5 * num_tokens)
    scenario = Scenario(
        name="many devices", arch=arch, topology=where, num_slots=slots, slot_s=slot_s,
        requests=Requests(np.array([0.0]), np.array([16]), np.array([num_tokens])),
        background=background_load(slots, num_devices, rng=rng),
    )  # fmt: skip
    started = time.perf_counter()
    (outcome,) = run([Case(planner="myopic:paper", scenario=scenario)])
    finite = outcome.tpot_s[np.isfinite(outcome.tpot_s)]
    return {
        "devices": num_devices,
        "tokens": num_tokens,
        "seconds": time.perf_counter() - started,
        "finished": float(np.isfinite(outcome.finish_s[0])),
        "decisions": len(outcome.decisions_s),
        "decision_s": float(outcome.decisions_s.mean()),
        "decision_share_of_token": float(outcome.decisions_s.mean() / finite.mean()),
        "moves": outcome.migrations,
    }


def simulator_speed() -> dict[str, Any]:
    """Everything that the suite reports; about three minutes."""
    return {
        "suite": "simulator",
        "slots_per_s": {str(n): slots_per_s(n) for n in (1, 64, 256)},
        "many_devices": [many_devices(25, 300), many_devices(48, 1000)],
    }
