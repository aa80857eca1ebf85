"""Clusters without a cloud, and head-level planners against the optimum: predicted times, nothing simulated."""

import time

import numpy as np

from splitray.arch import ModelArch
from splitray.catalog import architecture, device_values, link_values
from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.planners import ClusterState, make_planner
from splitray.planners.exact import solve
from splitray.planners.memory import needed_bytes
from splitray.report.document import Cell, Number, Table
from splitray.route import compile_route
from splitray.sim.scenario import random_cluster
from splitray.topology import Topology, parse_topology

PLANNERS = (
    "best_device", "greedy", "round_robin", "layer_dp:paper", "layer_dp", "tensor_parallel:paper", "tensor_parallel",
    "myopic:paper", "myopic", "drift_plus_penalty", "exact",
)  # fmt: skip
INSTANCES, CLUSTERS = 40, 5


def five_boards() -> Topology:
    """Two Jetsons, a phone and two Raspberry Pi 5 on one gigabit network: no cloud, no device that holds a 7B model."""
    kinds = ("jetson-orin-nx-8gb", "jetson-orin-nx-8gb", "galaxy-s23", "raspberry-pi-5", "raspberry-pi-5")
    devices = [{"id": f"d{i}", "tier": "edge", **device_values(k)} for i, k in enumerate(kinds)]
    lan = link_values("gigabit-lan")
    ids = [d["id"] for d in devices]
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
    return parse_topology({"devices": devices, "links": [{"between": [a, b], **lan} for a, b in pairs]})


def boards() -> Table:
    """Predicted times on a cluster without a cloud, and the gap to what is provably possible."""
    rows: list[tuple[Cell, ...]] = []
    for model in ("gpt2-xl", "llama-7b"):
        state = ClusterState(arch=architecture(model), topology=five_boards(), context_tokens=512)
        best = solve(state)
        rows += [(model, name, *_planned(name, state, best.lower_bound_s)) for name in PLANNERS]
    return Table(
        "Five boards on one gigabit network (2 Orin NX 8 GB, S23, 2 Raspberry Pi 5)",
        ("model", "planner", "time a token", "over the proven bound", "exchanges", "largest share", "decision"),
        tuple(rows),
        "Context 512, bf16. The bound holds for every placement of heads, columns and rows, copies included.",
    )


def _planned(name: str, state: ClusterState, bound_s: float | None) -> tuple[Cell, ...]:
    started = time.perf_counter()
    try:
        placement = make_planner(name).propose(state)
    except InputError:
        return ("never fits", "", "", "", "")
    decision = time.perf_counter() - started
    seconds = CostModel(state.arch, state.topology).tpot_s(placement, context_tokens=state.context_tokens)
    needed = needed_bytes(placement, state)
    exchanges = compile_route(placement, state.arch, state.topology).exchanges_per_token
    return (
        Number(seconds, "s", "predicted"),
        Number(None if bound_s is None else seconds / bound_s, "ratio", "predicted"),
        Number(exchanges, "count", "predicted"),
        Number(float(max(needed.values())), "B", "predicted"),
        Number(decision, "s", "measured"),
    )


_HEADS = ModelArch(
    name="eight heads", num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64, hidden_dim=512, ffn_dim=2048,
    vocab=1000, context_tokens=4096,
)  # fmt: skip


def gaps_to_optimum() -> Table:
    """Head-level planners against the optimum of the same space under the same memory, 3 to 5 devices."""
    names = ("myopic:paper", "myopic:max", "myopic:weighted", "myopic:as_coded", "greedy", "round_robin")
    gaps: dict[str, list[float]] = {n: [] for n in names}
    unfit = dict.fromkeys(names, 0)
    piece = 1.6e6
    for seed in range(INSTANCES):
        rng = np.random.default_rng(seed)
        where = random_cluster(rng, int(rng.integers(3, 6)), (4 * piece, 30 * piece))
        state = ClusterState(arch=_HEADS, topology=where, context_tokens=256, interval_tokens=16)
        try:
            best = solve(state, "heads")
        except InputError:
            continue
        for name in names:
            try:
                placement = make_planner(name).propose(state)
            except InputError:
                unfit[name] += 1
                continue
            gaps[name].append(CostModel(_HEADS, where).tpot_s(placement, context_tokens=256) / best.tpot_s - 1)
    rows: list[tuple[Cell, ...]] = []
    for name, found in gaps.items():
        shares = (Number(float(of(found)) if found else None, "share", "predicted") for of in (np.mean, np.max))
        rows.append((name, *shares, *(Number(n, "count", "predicted") for n in (len(found), unfit[name]))))
    return Table(
        "Gap to the optimum of heads by count, 3-5 random devices",
        ("planner", "mean gap", "largest", "instances", "found no place"),
        tuple(rows),
        "One layer of 8 heads, devices of 5-50 GFLOPS, links of 1-10 Gbit/s; equal memory limits for all. What may "
        "choose more than heads is in the suite gaps.",
    )


def many_devices() -> Table:
    """25 random devices and 32 heads at 1,000 tokens, the size that readers of arXiv 2505.02533 report."""
    arch = architecture("llama-7b")
    names = (
        "myopic:paper", "myopic", "layer_dp:paper", "layer_dp", "tensor_parallel:paper", "tensor_parallel", "greedy",
        "round_robin", "best_device",
    )  # fmt: skip
    seconds, memory, decisions = ({n: list[float]() for n in names} for _ in range(3))
    for seed in range(CLUSTERS):
        where = random_cluster(np.random.default_rng([7, seed]), 25, (1e9, 8e9))
        state = ClusterState(arch=arch, topology=where, context_tokens=1000)
        for name in names:
            started = time.perf_counter()
            try:
                placement = make_planner(name).propose(state)
            except InputError:
                continue
            decisions[name].append(time.perf_counter() - started)
            seconds[name].append(CostModel(arch, where).tpot_s(placement, context_tokens=1000))
            memory[name].append(float(max(needed_bytes(placement, state).values())))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        if not seconds[name]:
            rows.append((name, *("never fits",) * 5))
            continue
        token, myopic, held, decision = (
            float(np.mean(x)) for x in (seconds[name], seconds["myopic:paper"], memory[name], decisions[name])
        )
        predicted = Number(token, "s", "predicted"), Number(token / myopic, "ratio", "predicted")
        measured = Number(decision, "s", "measured"), Number(decision / token, "share", "measured")
        rows.append((name, *predicted, Number(held, "B", "predicted"), *measured))
    return Table(
        "LLaMA-7B on 25 random devices, 1,000 tokens",
        ("planner", "time a token", "over myopic:paper's", "fullest device", "decision", "of a token's time"),
        tuple(rows),
        f"Means over {CLUSTERS} clusters; devices of 1 to 8 GB. What ends in :paper is our faithful form of a paper's "
        "planner; the same name alone may use every device and end.",
    )
