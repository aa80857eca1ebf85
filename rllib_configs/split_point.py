"""Where to cut as the channel changes (arXiv 2406.02616): PPO with Table 4's settings, rewards from the surrogate."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitray.rl.split_recipe import SplitRecipe


def split_point(seed: int = 0) -> SplitRecipe:
    """As many decisions as the released code takes: about two minutes."""
    return SplitRecipe(name="split_point", seed=seed, noise="sigma", steps=240_000)


def split_point_smoke(seed: int = 0) -> SplitRecipe:
    """A few updates: whether everything is wired."""
    return SplitRecipe(name="split_point_smoke", seed=seed, noise="sigma", steps=2_000)


SPLIT_RECIPES: dict[str, Callable[[int], SplitRecipe]] = {f.__name__: f for f in (split_point, split_point_smoke)}


def run(recipe: SplitRecipe, out: Path, told: Callable[[int, int], None]) -> dict[str, Any]:
    """Train on the shipped model's surrogate, judge on its table, and write the policy with its card and the curve."""
    import numpy as np

    from splitray.quality.surrogate import shipped_surrogate
    from splitray.quality.table import shipped_quality
    from splitray.rl.split_learning import train, untrained
    from splitray.rl.split_policies import greedy, judge, optimal, stay, uniform
    from splitray.rl.split_quality import MeasuredQuality, learned_from

    table = shipped_quality()
    measured = MeasuredQuality.of_table(table, recipe.noise)
    quality = learned_from(
        recipe.rewards, measured, shipped_surrogate(), model=table.model, num_layers=table.num_layers,
        noise=recipe.noise, updates=recipe.measured_updates, seed=recipe.seed,
    )  # fmt: skip
    mdp, truth = recipe.process(quality), recipe.process(measured)
    starts = truth.starts(np.random.default_rng(1), 500)
    curve: list[tuple[int, float]] = []

    def look(steps: int, network: Any) -> None:
        told(steps, recipe.steps)
        curve.append((steps, float(judge(truth, network.policy(truth), starts).returns.mean())))

    trained = train(recipe, mdp, look)
    policies = {
        "learned": trained.network.policy(truth), "optimal": optimal(truth), "greedy": greedy(truth),
        "stay": stay(truth), "random": uniform(truth, np.random.default_rng(2)),
        "untrained": untrained(recipe, mdp).policy(truth),
    }  # fmt: skip
    results = {
        "returns": {name: float(judge(truth, p, starts).returns.mean()) for name, p in policies.items()},
        "steps": trained.steps,
        "train_s": trained.seconds,
        "judged_on": f"{len(starts)} starts, measured table of {table.model}",
    }
    folder = out / recipe.name
    paths = trained.network.save(folder / "policy", recipe, results)
    with (folder / "progress.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("steps", "judged_return"), *curve])
    return {"recipe": recipe.name, "policy": [str(p) for p in paths], **json.loads(json.dumps(results))}
