"""Counterparts of Figures 3 and 5 to 9 of Chen et al. (arXiv 2406.02616), each a plot and a table.

What is learned comes from `Runs`, which trains nothing twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from splitray.arrays import Floats
from splitray.evaluate.split_runs import STARTS, Runs, simulated, spread
from splitray.quality.table import QualityTable
from splitray.report.document import Cell, Number, Table
from splitray.report.split_plots import Curve, curves_plot, decisions_plot, violins_plot
from splitray.rl.split_point.learning import untrained
from splitray.rl.split_point.policies import Judged, Policy, greedy, optimal, stay, uniform
from splitray.rl.split_point.process import AS_CODED, AS_CODED_MEASURED, AS_PRINTED, Case, SplitErrata
from splitray.rl.split_point.quality import Noise
from splitray.rl.split_point.recipe import SplitRecipe

DECISIONS = 500
_NOISES = ("loss", "sigma", "awgn")
_CASES: tuple[Case, ...] = ("L", "H", "A")
_A2C: dict[str, Any] = {"algorithm": "a2c", "learning_rate": 7e-4, "rollout_steps": 50}
_DQN: dict[str, Any] = {"algorithm": "dqn", "learning_rate": 5e-4}
_SWEPT: dict[str, list[tuple[str, Any]]] = {
    "learning rate": [("learning_rate", 5e-4), ("learning_rate", 7e-4)],
    "batch": [("minibatch_steps", 200)],
    "clip": [("clip", 0.1), ("clip", 0.3)],
    "GAE": [("trace_decay", 0.9), ("trace_decay", 0.99)],
}


def _by_cut(table: QualityTable, noise: str) -> dict[str, Curve]:
    found: dict[float, dict[int, tuple[float, float]]] = {}
    for row in table.rows:
        kind, _, strength = row.channel.partition(":")
        if kind == noise and "," not in strength and row.codec == "none" and row.at.startswith("cut:"):
            cut = int(row.at.removeprefix("cut:"))
            found.setdefault(float(strength), {})[cut] = (table.relative(row), 1.96 * row.standard_error)
    return {
        f"{noise}:{strength:g}": Curve(sorted(by), [by[c][0] for c in sorted(by)], [by[c][1] for c in sorted(by)])
        for strength, by in sorted(found.items())
    }


def figure_3(tables: Sequence[QualityTable]) -> Figure:
    """Perplexity by cut, a panel a model and kind of channel, a line a channel."""
    panels = {f"{table.model}: {noise}": _by_cut(table, noise) for table in tables for noise in _NOISES}
    return curves_plot(panels, "cut p, layers on the device", "relative perplexity")


def strengths(table: QualityTable) -> Table:
    """Points of Fig. 3 as a table: relative perplexity at the cuts 1, 4, 7 and 10, by channel."""
    rows: list[tuple[Cell, ...]] = []
    for noise in _NOISES:
        for name, curve in _by_cut(table, noise).items():
            shown = [i for i, p in enumerate(curve.x) if p in (1, 4, 7, 10)]
            assert curve.half is not None, "made with intervals"
            numbers = [
                Number(curve.y[i], "ratio", "measured", f"{curve.y[i]:.3f} ± {curve.half[i]:.3f}") for i in shown
            ]
            rows.append((name, *numbers))
    return Table(
        f"Relative perplexity by channel and cut (Fig. 3), {table.model}",
        ("channel", "p = 1", "4", "7", "10"),
        tuple(rows),
        f"Over the exact model's ({table.architecture}, {table.num_layers} layers, perplexity {table.perplexity:.4g} "
        f"on {table.text}); 95 % intervals over tokens, each compared with itself in the exact run.",
    )


def monotone(tables: Sequence[QualityTable]) -> Table:
    """Which way perplexity goes with strength and cut, and how often it does not."""
    rows: list[tuple[Cell, ...]] = []
    for table in tables:
        for noise in _NOISES:
            curves = list(_by_cut(table, noise).values())
            y_VP, half_VP = np.array([c.y for c in curves]), np.array([c.half for c in curves])
            for along, name in enumerate(("strength" if noise != "awgn" else "ratio", "p")):
                step = np.diff(y_VP, axis=along)
                first, last = (np.delete(half_VP, end, axis=along) for end in (-1, 0))
                way = np.sign(step.sum())
                counts = step.size, (way * step < 0).sum(), (way * step < -np.hypot(first, last)).sum()
                numbers = (Number(float(n), "count", "measured") for n in counts)
                rows.append((f"{table.model}: {noise}", f"{'rises' if way > 0 else 'falls'} with {name}", *numbers))
    return Table(
        "Monotone within noise (Fig. 3)",
        ("channel", "relative perplexity", "steps", "the other way", "beyond noise"),
        tuple(rows),
        "A step goes to the next strength or cut that was measured; noise is the 95 % interval of two measurements "
        "without what they have in common.",
    )


def programs(runs: Runs, base: SplitRecipe) -> Table:
    """The exact program and simple policies in every variant of the process."""
    variants: dict[str, SplitRecipe] = {f"A, u = {u}": replace(base, reach=u) for u in (1, 2, 3, 4)}
    variants |= {"L, u = 1": replace(base, case="L"), "H, u = 1": replace(base, case="H")}
    variants |= {f"{c}, u = 1, channel of its own": replace(base, case=c, channel="exogenous") for c in _CASES}
    variants |= {
        "as coded, surrogate's script": replace(base, case="coded", errata=AS_CODED, reach=4),
        "as coded, measuring script": replace(base, case="coded", errata=AS_CODED_MEASURED),
        "reward as printed, eq. (9)": replace(base, errata=AS_PRINTED & ~SplitErrata.BARE_STATE),
    }
    rows: list[tuple[Cell, ...]] = []
    for name, recipe in variants.items():
        runs.tell(f"{base.noise}: {name}")
        truth = runs.truth(recipe)
        policies = (optimal(truth), greedy(truth), uniform(truth, np.random.default_rng(2)), stay(truth))
        rows.append((name, *(simulated(float(runs.judged(recipe, p).returns.mean())) for p in policies)))
    return Table(
        f"Policies that learn nothing, {base.noise}",
        ("variant", "optimal", "greedy", "random", "never move"),
        tuple(rows),
        "Mean sum of the five rewards, not discounted. The printed reward is in relative perplexities and charges 1 a "
        "layer, as the paper gives no lambda.",
    )


def figure_5(runs: Runs, base: SplitRecipe) -> tuple[Figure, Table]:
    """Fig. 5: PPO, A2C and DQN in the cases L, H and A, beside the optimum."""
    rows: list[tuple[Cell, ...]] = []
    panels, levels = {}, {}
    for case in _CASES:
        ppo = replace(base, case=case)
        recipes = {"PPO": ppo, "A2C": replace(ppo, **_A2C), "DQN": replace(ppo, **_DQN)}
        panels[f"case {case}"] = {name: runs.curve(recipe) for name, recipe in recipes.items()}
        best = float(runs.judged(ppo, optimal(runs.truth(ppo))).returns.mean())
        levels[f"case {case}"] = {"optimum": best}
        means = [spread([j.returns.mean() for j in runs.learned(r)]) for r in recipes.values()]
        rows.append((case, *means, simulated(best)))
    table = Table(
        "PPO, A2C and DQN (Fig. 5), noise of fixed sigma",
        ("case", *recipes, "optimum"),
        tuple(rows),
        f"After {base.steps} decisions with the surrogate's rewards, 95 % intervals over seeds. The paper's figure has "
        "PPO first in H and A, and all alike in L.",
    )
    return curves_plot(panels, "decisions", "mean sum of rewards", levels), table


def policies(runs: Runs, base: SplitRecipe) -> dict[str, list[Judged]]:
    """What each policy got in case A, for every seed where seeds matter."""
    truth = runs.truth(base)
    one = partial(runs.judged, base)

    def untaught(seed: int) -> Policy:
        return untrained(replace(base, seed=seed), truth).policy(truth)

    return {
        "random": [one(uniform(truth, np.random.default_rng([2, seed]))) for seed in runs.seeds],
        "untrained": [one(untaught(seed)) for seed in runs.seeds],
        "never move": [one(stay(truth))],
        "greedy": [one(greedy(truth))],
        "PPO, measured": runs.learned(replace(base, rewards="measured")),
        "PPO, surrogate": runs.learned(base),
        "optimal": [one(optimal(truth))],
    }


def figure_6(runs: Runs, bases: Mapping[Noise, SplitRecipe]) -> tuple[Figure, list[Table]]:
    """Distributions of returns in case A."""
    panels, tables = {}, []
    for noise, base in bases.items():
        found = policies(runs, base)
        panels[f"case A, {noise}"] = {n: np.concatenate([j.returns for j in js]) for n, js in found.items()}
        best = float(found["optimal"][0].returns.mean())
        rows: list[tuple[Cell, ...]] = []
        for name, judged in found.items():
            means = [float(j.returns.mean()) for j in judged]
            low, high = np.quantile(np.concatenate([j.returns for j in judged]), [0.25, 0.75])
            share = Number(float(np.mean(means)) / best, "share", "simulated")
            rows.append((name, spread(means), share, simulated(float(high - low))))
        tables.append(Table(
            f"Policies in case A (Fig. 6), {noise}", ("policy", "mean sum", "of the optimum", "interquartile range"),
            tuple(rows), f"On the same {STARTS} starts; 95 % intervals over seeds where there are several.",
        ))  # fmt: skip
    return violins_plot(panels, "sum of an episode's rewards"), tables


def figure_7(runs: Runs, bases: Mapping[Noise, SplitRecipe]) -> tuple[Figure, Table, dict[Noise, float]]:
    """Decisions against the channel; also Spearman's rho of PPO by channel."""
    panels: dict[str, tuple[str, Floats, Floats]] = {}
    rows: list[tuple[Cell, ...]] = []
    rho: dict[Noise, float] = {}
    for noise, base in bases.items():
        wide = replace(base, reach=4)
        truth = runs.truth(wide)
        judged = {
            "PPO, u = 1": runs.learned(base)[0],
            "optimal, u = 1": runs.judged(base, optimal(runs.truth(base))),
            "optimal, u = 4": runs.judged(wide, optimal(truth)),
        }
        for name, found in judged.items():
            x, p = (a.T.ravel()[:DECISIONS].astype(float) for a in (found.noise, found.cut))  # whole episodes
            told, chance = _spearman(x, p)
            last, _ = _spearman(found.noise[-1], found.cut[-1])
            p_value = "< 0.001" if chance < 0.001 else f"{chance:.3f}"
            number = Number(told, "", "simulated", f"{told:.2f}, p {p_value}")
            rows.append((noise, name, number, simulated(last)))
            if name.startswith("PPO"):
                rho[noise] = told
            if name != "optimal, u = 1":
                panels[f"{noise}: {name}"] = (noise, x, p)
    table = Table(
        "Strength of the channel and the cut (Fig. 7)",
        ("channel", "policy", f"Spearman over {DECISIONS} decisions", "over last decisions"),
        tuple(rows),
        "The starts are drawn apart from the strength; with u = 1 five steps do not reach everywhere.",
    )
    return decisions_plot(panels), table, rho


def figure_8(runs: Runs, base: SplitRecipe) -> tuple[Figure, Table]:
    """Fig. 8: actions that move the cut by at most u = 1, 2 or 3 layers."""
    recipes = {f"u = {u}": replace(base, reach=u) for u in (1, 2, 3)}
    rows: list[tuple[Cell, ...]] = []
    levels = {}
    for name, recipe in recipes.items():
        best = float(runs.judged(recipe, optimal(runs.truth(recipe))).returns.mean())
        levels[f"optimum, {name}"] = best
        means = [float(j.returns.mean()) for j in runs.learned(recipe)]
        rows.append((name, spread(means), simulated(best), Number(float(np.mean(means)) / best, "share", "simulated")))
    title = "case A, sigma"
    curves = {title: {name: runs.curve(recipe) for name, recipe in recipes.items()}}
    table = Table("Action spaces (Fig. 8)", ("reach", "PPO", "optimum", "of the optimum"), tuple(rows),
                  f"After {base.steps} decisions, 95 % intervals over seeds.")  # fmt: skip
    return curves_plot(curves, "decisions", "mean sum of rewards", {title: levels}), table


def figure_9(runs: Runs, base: SplitRecipe) -> tuple[Figure, Table]:
    """Fig. 9: one setting of PPO at a time changed from Table 4."""
    rows: list[tuple[Cell, ...]] = [("Table 4", spread([j.returns.mean() for j in runs.learned(base)]))]
    panels = {}
    for title, settings in _SWEPT.items():
        panels[title] = {"Table 4": runs.curve(base)}
        for name, value in settings:
            recipe = replace(base, **{name: value})
            panels[title][f"{value:g}"] = runs.curve(recipe)
            rows.append((f"{title} {value:g}", spread([j.returns.mean() for j in runs.learned(recipe)])))
    table = Table("Settings of PPO (Fig. 9), noise of fixed sigma", ("setting", "mean sum"), tuple(rows),
                  "One setting differs from Table 4 at a time; 95 % intervals over seeds.")  # fmt: skip
    return curves_plot(panels, "decisions", "mean sum of rewards"), table


def _spearman(x: Floats, p: Floats) -> tuple[float, float]:
    """Correlation of ranks, and the chance of more by accident; 0 where all cuts are one."""
    if np.ptp(p) == 0:
        return 0.0, 1.0
    told = spearmanr(x, p)
    return float(told.statistic), float(told.pvalue)
