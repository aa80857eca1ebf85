"""The cost model against the clock: what a profile predicts for placements that it never saw, and what they take.

Probes and placements are run in turns and in no order, so that all see the same weather of a shared machine; the
profile is made of the probes alone (profiling/calibration.py).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.placement import Placement
from splitray.planners import ClusterState, make_planner
from splitray.profiling.calibration import PROMPT, Calibration, Model
from splitray.profiling.machine import machine
from splitray.profiling.named_placements import placements
from splitray.profiling.random_llama import RandomLlama
from splitray.route import compile_route
from splitray.runtime.kept_fleet import KeptFleet
from splitray.scratch import scratch_folder
from splitray.topology import Topology
from splitray.weight_formats import as_format

ROUNDS, RANDOM = 3, 20
FORMATS = ("float32", "int8", "int4")
_NEW_TOKENS = 18
_PROBED_EVERY = 9  # placements: some ten seconds


def predicted(
    recipe: RandomLlama,
    *,
    num_random: int = RANDOM,
    rounds: int = ROUNDS,
    seed: int = 0,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the bench's named placements and `num_random` random ones on two device processes, and predict each.

    Returns:
        `rows` with predicted and measured milliseconds a token and the error of the prediction, relative to what was
        measured; `median_error`, `worst_error` of its size; the `profile` that predicted. These are of the first of the
        `formats` of weights, the same keys of each under `formats`.
    """
    before, found = machine(), dict[str, dict[str, Any]]()
    for weights in formats:
        found[weights] = _in_format(recipe, weights, num_random, rounds, seed, partial(_told, progress, weights))
    return {"suite": "predicted", "model": recipe.name, "machine": before, **found[formats[0]], "formats": found}


def _told(progress: Callable[[str], None], weights: str, text: str) -> None:
    progress(f"{weights}: {text}")


def _in_format(
    recipe: RandomLlama, weights: str, num_random: int, rounds: int, seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    topology = Topology.uniform(2)
    with scratch_folder() as folder, KeptFleet(topology.devices) as fleet:
        progress("writing random weights")
        calibration = Calibration(fleet, topology, folder)
        model = Model(recipe.write(folder), topology, fleet, weights=weights)
        chosen = {**placements(model.arch, topology), **random_placements(model.arch, topology, num_random, seed)}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        rng, names = np.random.default_rng(seed), list(chosen)
        for i in range(rounds):
            for k, index in enumerate(rng.permutation(len(names))):
                progress(f"round {i + 1} of {rounds}: placement {k + 1} of {len(names)}")
                if k % _PROBED_EVERY == 0:
                    calibration.round()
                    if as_format(weights).is_held:
                        calibration.round_in(weights)
                name = names[index]
                times[name].append(model.token_s(chosen[name], new_tokens=_NEW_TOKENS))
        profile = calibration.profile()
        cost = CostModel(model.arch, profile.topology())
    context = len(PROMPT) + _NEW_TOKENS / 2
    rows = [
        _row(name, cost.tpot_s(p, context_tokens=context), times[name], compile_route(p, model.arch, topology))
        for name, p in chosen.items()
    ]
    errors = [abs(r["error"]) for r in rows]
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "rows": rows,
        "profile": profile.document(),
    }


def _row(name: str, predicted_s: float, times: list[float], route: Any) -> dict[str, Any]:
    measured_s = statistics.median(times)
    return {
        "name": name,
        "exchanges_per_token": route.exchanges_per_token,
        "predicted_ms": predicted_s * 1e3,
        "measured_ms": measured_s * 1e3,
        "measured_rounds_ms": [t * 1e3 for t in times],
        "error": predicted_s / measured_s - 1,
    }


def random_placements(arch: ModelArch, topology: Topology, count: int, seed: int) -> Mapping[str, Placement]:
    """What the planner `random` proposes, one after the other."""
    planner = make_planner("random", seed=seed)  # which cuts where the format allows it
    state = ClusterState(arch=arch, topology=topology, context_tokens=len(PROMPT) + _NEW_TOKENS)
    return {f"random_{i}": planner.propose(state) for i in range(count)}
