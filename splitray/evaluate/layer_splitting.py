"""The suite `layer-splitting`: counterparts of the figures and tables of Chen et al. (arXiv 2406.02616).

Everything is ours, on the model that ships and its measured table; what is the paper's is marked so. Figures 3 and 5 to
9 and Table 3. Noise of fixed sigma has the paper's trade-off (perplexity falls with p); losses have not, on our models.
"""

import resource
from dataclasses import replace
from typing import get_args

import numpy as np

from splitray.codecs import encoded_bytes
from splitray.evaluate.measured_reward import TimedReward, timed_reward
from splitray.evaluate.options import Options, Tell
from splitray.evaluate.split_figures import (
    DECISIONS,
    figure_3,
    figure_5,
    figure_6,
    figure_7,
    figure_8,
    figure_9,
    monotone,
    policies,
    programs,
    strengths,
)
from splitray.evaluate.split_runs import STARTS, Runs, simulated, spread
from splitray.model.reading import read_config
from splitray.quality.surrogate import shipped_surrogate
from splitray.quality.table import shipped_quality
from splitray.report.document import Cell, Number, Report, Table
from splitray.rl.split_point.quality import Noise
from splitray.rl.split_point.recipe import SplitRecipe
from splitray.runtime.launch import model_path

SEEDS, STEPS, TIMED = 5, 24_000, 200
PAPER_REWARD, PAPER_SURROGATE_REWARD = 2.9736, 2.9663
DEVIATIONS = (
    "The model is the 12-layer one that ships, not LLaMA2-7B; p goes from 1 to 10 of 12 layers, not of 32.",
    "Perplexities are weighted by tokens, over 5 masks; between measured strengths they are interpolated by lines.",
    "The reward is relative to the first perplexity (inferred from the sums of Table 3); the agent "
    "sees the first perplexity and the steps left besides strength and cut, as it is no function of these two.",
    "Policies are compared on the same starts, never on their training curves.",
    "Beside the paper's loss there is a fixed sigma: a loss costs the more the later it comes in our models, whose "
    "residual grows with depth, so that both terms of the reward want the earliest cut and there is nothing to trade.",
    "A2C is PPO with one epoch over one batch of 50, without clipping, lambda 1, learning rate 0.0007; DQN is double, "
    "with a batch of 100 every 8 steps, learning rate 0.0005 and all steps remembered. Advantages are normalised over "
    "a rollout, not a batch.",
)


def run(
    options: Options, tell: Tell, *, seeds: int = SEEDS, steps: int = STEPS, timed: int = TIMED, swept: bool = True
) -> Report:
    """The whole suite; with the defaults about a quarter of an hour on one quiet core.

    `seeds` and `steps` (decisions) are of each training, `timed` counts measured rewards that are timed; `swept`:
    whether Figures 8 and 9 are made. Of the options the seed counts.

    Raises:
        InputError: the shipped table cannot be used.
    """
    table, surrogate = shipped_quality(), shipped_surrogate()
    both = table, shipped_quality("tiny-neox")
    chosen = range(options.seed, options.seed + seeds)
    runs = Runs(table=table, surrogate=surrogate, seeds=chosen, tell=tell, before=options.done)
    bases = {noise: SplitRecipe(name=f"PPO, {noise}", noise=noise, steps=steps) for noise in get_args(Noise)}
    sigma = bases["sigma"]
    for base in bases.values():
        runs.of(base)
    peak = _peak_bytes()  # of learning alone, and then of learning beside a model: before anything else is done
    tell("measured rewards against the clock")
    reward = options.done.of("measured rewards", lambda: timed_reward(table, timed))
    plots = {"figure_3": figure_3(both)}
    tables = [*map(strengths, both), monotone(both), *(programs(runs, base) for base in bases.values())]
    plots["figure_5"], learned = figure_5(runs, sigma)
    plots["figure_6"], compared = figure_6(runs, bases)
    plots["figure_7"], correlated, rho = figure_7(runs, bases)
    tables += [learned, *compared, correlated]
    if swept:
        for name, figure in (("figure_8", figure_8), ("figure_9", figure_9)):
            plots[name], found = figure(runs, sigma)
            tables.append(found)
    tables.append(_table_3(runs, bases, reward, peak))
    tables.insert(0, _targets(runs, bases, reward, peak, rho))
    tables.append(Table("Where we deviate from the paper", ("",), tuple((d,) for d in DEVIATIONS)))
    captions = {
        "figure_3": "Relative perplexity by cut on two models of one recipe (Fig. 3); measured.",
        "figure_5": "PPO, A2C and DQN while they learn, fixed sigma, 95 % bands over seeds (Fig. 5); simulated.",
        "figure_6": "Sums of rewards of single episodes, all on the same starts (Fig. 6); simulated.",
        "figure_7": f"{DECISIONS} decisions of PPO with the surrogate, and a LOESS (Fig. 7); simulated.",
        "figure_8": "Action spaces of u = 1, 2, 3 and their optima (dotted, dashed, dash-dotted) (Fig. 8); simulated.",
        "figure_9": "Other settings than Table 4's, noise of fixed sigma (Fig. 9); simulated.",
    }
    return Report(
        title="Adaptive layer splitting",
        facts={
            "table": f"{table.model}, {table.num_layers} layers, {table.text}, {table.tokens} tokens, "
            f"{table.masks} masks, measured at {table.measured_at}; for Figure 3 also {both[1].model}, "
            f"{both[1].architecture} of the same recipe",
            "trainings": f"{steps} decisions each, {seeds} seeds from {options.seed}, one thread",
            "judged on": f"the same {STARTS} starts of a case, rewards from the measured table, greedy",
        },
        tables=tuple(tables),
        plots=plots,
        captions=captions,
    )


def _table_3(runs: Runs, bases: dict[Noise, SplitRecipe], reward: TimedReward, peak_bytes: float) -> Table:
    rows: list[tuple[Cell, ...]] = [
        ("paper, without surrogate", _paper(PAPER_REWARD), Number(24 * 86400, "s", "paper", "over 24 days"),
         Number(16.3e9, "B", "paper")),
        ("paper, with surrogate", _paper(PAPER_SURROGATE_REWARD), Number(7.7 * 60, "s", "paper"),
         Number(1e9, "B", "paper", "below 1 GB")),
    ]  # fmt: skip
    for noise, base in bases.items():
        with_it, without = runs.of(base), replace(base, rewards="measured")
        learning = float(np.mean([r.seconds for r in with_it]))
        slow = learning + base.steps * reward.seconds
        told = Number(slow, "s", "predicted", f"{slow / 86400:.1f} days, extrapolated")
        for name, recipe, seconds, peak in (
            ("without", without, told, reward.peak_bytes),
            ("with", base, Number(learning, "s", "measured"), peak_bytes),
        ):
            mean = spread([j.returns.mean() for j in runs.learned(recipe)])
            rows.append((f"{noise}, {name} surrogate", mean, seconds, Number(peak, "B", "measured")))
    return Table(
        "With and without surrogate (Table 3)",
        ("", "mean sum of rewards", "training", "memory"),
        tuple(rows),
        f"{reward.about} Without surrogate, the rewards of our trainings are looked up in the measured table, and "
        "the time is what measuring each of them anew would take. Memory is the peak of the whole process behind the "
        "trainings with the surrogate, and behind measured rewards. The paper's rewards are of another model, and a "
        "difference of 0.007 is within the sampling error of 100 episodes.",
    )


def _targets(
    runs: Runs, bases: dict[Noise, SplitRecipe], reward: TimedReward, peak_bytes: float, rho: dict[Noise, float]
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for noise, base in bases.items():
        found = {name: float(np.mean([j.returns.mean() for j in js])) for name, js in policies(runs, base).items()}
        ours, share = found["PPO, surrogate"], found["PPO, surrogate"] / found["optimal"]
        apart = abs(ours / found["PPO, measured"] - 1)
        learning_s = float(np.mean([r.seconds for r in runs.of(base)]))
        faster = (learning_s + base.steps * reward.seconds) / learning_s
        rows += [
            (f"{noise}: PPO with the surrogate over the optimum", "97.5 %", _share(share), _met(share, 0.975)),
            (f"{noise}: away from PPO with measured rewards", "at most 0.5 %", _share(apart), _met(-apart, -0.005)),
            (f"{noise}: better than random by", "0.2", simulated(ours - found["random"]),
             _met(ours - found["random"], 0.2)),
            (f"{noise}: Spearman of strength and p", "above 0.3", simulated(rho[noise]), _met(rho[noise], 0.3)),
            (f"{noise}: training faster by", "1,000x", Number(faster, "ratio", "predicted", f"{faster:,.0f}x"),
             _met(faster, 1000)),
        ]  # fmt: skip
    told = runs.surrogate.metrics["loss_at_cut"]
    rise = max(abs(runs.table.relative(r) - 1) for r in runs.table.rows if (r.channel, r.codec) == ("none", "int8"))
    width = read_config(model_path(runs.table.model)).hidden_size
    sent = encoded_bytes("int8", 1, width) / encoded_bytes("bf16", 1, width)
    rows += [
        ("memory with the surrogate", "1 GB", Number(peak_bytes, "B", "measured"), _met(-peak_bytes, -1e9)),
        ("surrogate, squared error at held-out losses and cuts", "at most 0.00548", _plain(told.mse),
         _met(-told.mse, -0.00548)),
        ("surrogate, absolute error there", "at most 0.050", _plain(told.mae), _met(-told.mae, -0.05)),
        ("surrogate, R2 there", "at least 0.9", _plain(told.r2), _met(told.r2, 0.9)),
        ("int8, most that a cut costs in relative perplexity", "below 1 %", Number(rise, "share", "measured"),
         _met(-rise, -0.01)),
        ("int8, bytes over those of bf16", "0.5 within 5 %", Number(sent, "ratio", "predicted", f"{sent:.3f}"),
         _met(-abs(sent / 0.5 - 1), -0.05)),
    ]  # fmt: skip
    return Table(
        "Targets",
        ("target", "wanted", "reached", ""),
        tuple(rows),
        f"Means over seeds, case A, {STARTS} starts; the surrogate's errors by cross-validation. Under losses "
        "perplexity rises with p on the shipped model, so that the best policy goes to the earliest cut whatever the "
        "channel: none near the optimum correlates with the strength there.",
    )


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _plain(value: float) -> Number:
    return Number(value, "", "measured")


def _share(value: float) -> Number:
    return Number(float(value), "share", "simulated", f"{100 * value:.2f} %")


def _paper(value: float) -> Number:
    return Number(value, "", "paper", f"{value:.4f}")


def _met(value: float, wanted: float) -> str:
    return "yes" if value >= wanted else "no"
