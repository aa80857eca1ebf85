"""Where to cut as the channel changes (arXiv 2406.02616): PPO with Table 4's settings, rewards from the surrogate."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitray.results import write_whole
from splitray.rl.split_point.recipe import SplitRecipe


def split_point(seed: int = 0) -> SplitRecipe:
    """As many decisions as the released code takes: about two minutes."""
    return SplitRecipe(name="split_point", seed=seed, noise="sigma", steps=240_000)


def split_point_smoke(seed: int = 0) -> SplitRecipe:
    """A few updates: whether everything is wired."""
    return SplitRecipe(name="split_point_smoke", seed=seed, noise="sigma", steps=2_000)


def split_point_in_loop(seed: int = 0) -> SplitRecipe:
    """Algorithm 1: ten updates with rewards from the measured table, then a surrogate is fitted to them."""
    return SplitRecipe(name="split_point_in_loop", seed=seed, noise="sigma", rewards="in_loop", steps=24_000)


SPLIT_RECIPES: dict[str, Callable[[int], SplitRecipe]] = {
    f.__name__: f for f in (split_point, split_point_smoke, split_point_in_loop)
}


def run(recipe: SplitRecipe, out: Path, told: Callable[[int, int], None]) -> dict[str, Any]:
    """Train on the recipe's rewards, judge on the measured table, and write the policy with its card and the curve."""
    import numpy as np

    from splitray.quality.surrogate import shipped_surrogate
    from splitray.quality.table import shipped_quality
    from splitray.rl.split_point.learning import train, untrained
    from splitray.rl.split_point.policies import greedy, judge, optimal, stay, uniform
    from splitray.rl.split_point.quality import InLoopQuality, MeasuredQuality, learned_from

    table = shipped_quality()
    measured = MeasuredQuality.of_table(table, recipe.noise)
    quality = learned_from(
        recipe.rewards, measured, shipped_surrogate(), model=table.model, num_layers=table.num_layers,
        noise=recipe.noise, updates=recipe.measured_updates, seed=recipe.seed,
    )  # fmt: skip
    mdp, truth = recipe.process(quality), recipe.process(measured)
    starts = truth.starts(np.random.default_rng(1), 500)
    loop = quality.loop if isinstance(quality, InLoopQuality) else None
    curve: list[tuple[int, float, bool]] = []

    def look(steps: int, network: Any) -> None:
        told(steps, recipe.steps)
        surrogate = recipe.rewards == "surrogate" if loop is None else loop.uses_surrogate
        curve.append((steps, float(judge(truth, network.policy(truth), starts).returns.mean()), surrogate))

    trained = train(recipe, mdp, look)
    policies = {
        "learned": trained.network.policy(truth), "optimal": optimal(truth), "greedy": greedy(truth),
        "stay": stay(truth), "random": uniform(truth, np.random.default_rng(2)),
        "untrained": untrained(recipe, mdp).policy(truth),
    }  # fmt: skip
    results: dict[str, Any] = {
        "returns": {name: float(judge(truth, p, starts).returns.mean()) for name, p in policies.items()},
        "steps": trained.steps,
        "train_s": trained.seconds,
        "judged_on": f"{len(starts)} starts, measured table of {table.model}",
    }
    if loop is not None:
        results["algorithm_1"] = {
            "switched_at_update": loop.switched_at,
            "measured_rewards": len(loop.records),
            "fit_s": loop.fit_s,
            "return_at_switch": None if loop.switched_at is None else curve[loop.switched_at - 1][1],
        }
    folder = out / recipe.name
    paths = trained.network.save(folder / "policy", recipe, results)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("steps", "judged_return", "next_rewards_from_surrogate"), *curve])
    write_whole(folder / "progress.csv", text.getvalue())
    return {"recipe": recipe.name, "policy": [str(p) for p in paths], **json.loads(json.dumps(results))}
