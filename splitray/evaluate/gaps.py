"""The suite `gaps`: planners against the exact optimum on small random instances, with pinned ends and without.

Devices, links and memory are drawn wide, so that one device, one cut, shares of heads and columns and copies are each
the best somewhere, and every other instance is short of memory. All planners get the same instances, and only predicted
times are compared.
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import permutations
from typing import Literal

import numpy as np

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.evaluate.options import Options, Tell
from splitray.planners import ClusterState, make_planner
from splitray.planners.exact import solve
from splitray.planners.memory import model_bytes
from splitray.report.document import Cell, Number, Report, Table
from splitray.topology import Device, DeviceId, Link, Topology

INSTANCES, CONTEXT = 40, 200
PLANNERS = (
    "myopic", "myopic:paper", "drift_plus_penalty", "layer_dp", "layer_dp:paper", "layer_cut", "layer_cut:paper",
    "static_cut", "static_cut:paper", "tensor_parallel", "tensor_parallel:paper", "greedy", "best_device",
)  # fmt: skip
Holds = Literal["none", "embedding_and_head"]


def instance(seed: int, holds: Holds) -> ClusterState:
    """A decoder of four layers on 2 to 4 devices of unlike speed, over links of 0.1 to 80 ms."""
    rng = np.random.default_rng([seed, holds == "none"])
    arch = ModelArch(
        name="four layers", num_layers=4, num_heads=6, num_kv_heads=6, head_dim=16, hidden_dim=128,
        ffn_dim=int(rng.choice([256, 1024])), vocab=2000, context_tokens=4096,
    )  # fmt: skip
    needed = model_bytes(ClusterState(arch=arch, topology=Topology.uniform(1), context_tokens=CONTEXT + 64))
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"), tier="cloud" if i and rng.random() < 0.7 else "edge", compute_flops=1e12,
            memory_bytes=needed * (float(rng.uniform(0.4, 1.3)) if seed % 2 else 3.0),
            memory_bandwidth_bytes_per_s=float(np.exp(rng.uniform(np.log(2e7), np.log(2e9)))),
            launch_s=float(rng.choice([0.0, 1e-5])), idle_w=2.0, active_w=float(rng.uniform(4, 20)),
        )
        for i in range(2 + seed % 3)
    )  # fmt: skip
    rtt_s = float(np.exp(rng.uniform(np.log(1e-4), np.log(8e-2))))
    links = tuple(
        Link(
            source=a.id, target=b.id, bandwidth_bytes_per_s=float(np.exp(rng.uniform(np.log(1e6), np.log(1e9)))),
            rtt_s=rtt_s * float(rng.uniform(0.7, 1.5)), exchange_s=float(rng.choice([0.0, 5e-5])),
        )
        for a, b in permutations(devices, 2)
    )  # fmt: skip
    where = Topology(devices=devices, links=links, origin=devices[0].id, origin_holds=holds)
    return ClusterState(arch=arch, topology=where, context_tokens=CONTEXT)


def gaps(
    holds: Holds, planners: Sequence[str], count: int = INSTANCES, *, first: int = 0
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Each planner's time a token over the exact planner's, less one, and its seconds a decision, by instance.

    NaN where it finds no placement; instances on which none fits at all are left out and others drawn.
    """
    found: dict[str, list[float]] = {p: [] for p in planners}
    taken: dict[str, list[float]] = {p: [] for p in planners}
    seed, solved = first, 0
    while solved < count:
        state = instance(seed, holds)
        seed += 1
        try:
            best = solve(state)
        except InputError:
            continue
        solved += 1
        cost = CostModel(state.arch, state.topology)
        for planner in planners:
            started, seconds = time.perf_counter(), float("nan")
            try:
                placement = make_planner(planner).propose(state)
                seconds = cost.tpot_s(placement, context_tokens=CONTEXT)
            except InputError:
                pass
            taken[planner].append(time.perf_counter() - started)
            found[planner].append(seconds / best.tpot_s - 1)
    return found, taken


def run(options: Options, tell: Tell) -> Report:
    """The whole suite; about a minute on one core."""
    tables = []
    for holds in ("none", "embedding_and_head"):
        tell(f"{INSTANCES} instances, origin holds {holds.replace('_', ' ')}")
        work = partial(gaps, holds, PLANNERS, first=1000 * options.seed)
        found, taken = options.done.of(holds, work)
        rows: list[tuple[Cell, ...]] = []
        for planner in PLANNERS:
            values = np.array(found[planner])
            fits = values[np.isfinite(values)]
            mean, most = (
                Number(float(of(fits)) if len(fits) else None, "share", "predicted") for of in (np.mean, np.max)
            )
            unfit = Number(len(values) - len(fits), "count", "predicted")
            rows.append((planner, mean, most, unfit, Number(float(np.mean(taken[planner])), "s", "measured")))
        tables.append(
            Table(
                f"Gap to the optimum of all placements, origin holds {holds.replace('_', ' ')}",
                ("planner", "mean gap", "largest", "found no place", "decision"),
                tuple(rows),
                "Time a token over that of `exact`, which searches every placement that the engine can execute. What "
                "ends in :paper is restricted as its paper is; the others may use every device and end.",
            )
        )
    return Report(
        title="Planners against the optimum",
        facts={"instances": f"{INSTANCES} with pinned ends and {INSTANCES} without, from {1000 * options.seed}"},
        tables=tuple(tables),
    )
