"""The learned policy beside a planner that knows the future, in drawn weather: what is left for online planners."""

import numpy as np

from splitray.evaluate.options import Options, Tell, shared_out
from splitray.report.document import Cell as Entry
from splitray.report.document import Number, Table
from splitray.rl.policy_planner import SHIPPED
from splitray.rl.training.clairvoyant import AHEAD, CANDIDATES, foreseen
from splitray.rl.training.holdout import program, score, served
from splitray.rl.world.action import ActionSpec
from splitray.rl.world.cell import Cell
from splitray.rl.world.policy import Policy
from splitray.rl.world.weather import Climate

CELLS = (
    Cell("jetson-orin-nx-16gb", "gpt2-xl"), Cell("jetson-orin-nx-16gb", "llama-7b"), Cell("galaxy-s23", "llama-13b"),
    Cell("jetson-orin-nx-16gb", "llama-7b", "embedding_and_head"), Cell("raspberry-pi-5", "gpt2-xl"),
)  # fmt: skip
LOADS = (0.8, 0.95)
_EDGES, _SLOTS, _SEED = 32, 100, 30_000


def clairvoyance(options: Options, tell: Tell) -> Table:
    """Mean latency of the program, of the learned policy, and of whoever tries all candidates on what is to come."""
    jobs = [(cell, load) for cell in CELLS for load in LOADS]
    rows: list[tuple[Entry, ...]] = []
    logs: list[float] = []
    tell("a planner that knows the future")
    for (cell, load), (usual, ours, best) in zip(jobs, shared_out(_one, jobs, options, _name), strict=True):
        logs.append(float(np.log(ours / best)))
        numbers = [Number(x, "s", "simulated") for x in (usual, ours, best)]
        rows.append((f"{cell.name} {load:.0%}", *numbers, Number(ours / best, "ratio", "simulated")))
    rows.append(("geometric mean", "", "", "", Number(float(np.exp(np.mean(logs))), "ratio", "simulated")))
    return Table(
        "Mean latency beside a planner that knows the future",
        ("cell", "the program alone", "splitwise", "knows the future", "splitwise over it"),
        tuple(rows),
        f"Drawn weather that no training saw, {_EDGES} edges, {_SLOTS} slots. Whoever knows the future tries "
        f"{len(CANDIDATES)} settings of the program's knobs and the policy itself for {AHEAD} slots on the bandwidth "
        "and requests that will come, all edges of a cloud alike, and goes on with the best one: no bound, but what "
        "foresight and agreement are worth.",
    )


def _name(job: tuple[Cell, float]) -> str:
    return f"knows the future: {job[0].name}, load {job[1]}"


def _one(job: tuple[Cell, float]) -> tuple[float, float, float]:
    cell, load = job
    climate, spec = Climate(cloud_load=load, bandwidth_sigma=0.7, rtt_sigma=0.2), ActionSpec()
    online = program(), served(Policy.load(SHIPPED))
    best = foreseen(online, cell, climate, spec=spec, seed=_SEED, num_edges=_EDGES, num_slots=_SLOTS)
    usual, ours = (
        score(d, cell, climate, spec=spec, seed=_SEED, num_instances=_EDGES, num_slots=_SLOTS).latency_s for d in online
    )
    return float(np.nanmean(usual)), float(np.nanmean(ours)), float(np.nanmean(best))
