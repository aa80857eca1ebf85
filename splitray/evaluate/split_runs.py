"""Trainings for the suite `layer-splitting`: judged on the same starts by measured rewards, and none done twice."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from splitray.arrays import Floats
from splitray.evaluate.options import Tell
from splitray.evaluate.shared_cloud import mean_and_interval
from splitray.quality.surrogate import Surrogate
from splitray.quality.table import QualityTable
from splitray.report.document import Number
from splitray.report.split_plots import Curve
from splitray.rl.split_point.learning import train
from splitray.rl.split_point.network import SplitNetwork
from splitray.rl.split_point.policies import Judged, Policy, judge
from splitray.rl.split_point.process import SplitPoint, States
from splitray.rl.split_point.quality import MeasuredQuality, Noise, learned_from
from splitray.rl.split_point.recipe import SplitRecipe
from splitray.unfinished import Unfinished

STARTS, _STARTS_SEED = 500, 1
_LOOKS = 12


@dataclass(frozen=True, slots=True)
class Run:
    """One training: the network, seconds of it, and mean returns on the starts while it learned."""

    network: SplitNetwork
    seconds: float
    steps: Sequence[int]
    returns: Sequence[float]


@dataclass(slots=True)
class Runs:
    """Trainings of the split point with several seeds each, each done once and kept."""

    table: QualityTable
    surrogate: Surrogate
    seeds: Sequence[int]
    tell: Tell = lambda _: None
    before: Unfinished = field(default_factory=Unfinished)
    _done: dict[SplitRecipe, Run] = field(default_factory=dict)
    _measured: dict[str, MeasuredQuality] = field(default_factory=dict)

    def measured(self, noise: Noise) -> MeasuredQuality:
        """The quality that the measured table states for this kind of noise."""
        if noise not in self._measured:
            self._measured[noise] = MeasuredQuality.of_table(self.table, noise)
        return self._measured[noise]

    def truth(self, recipe: SplitRecipe) -> SplitPoint:
        """The recipe's process with measured rewards."""
        return recipe.process(self.measured(recipe.noise))

    def starts(self, recipe: SplitRecipe) -> States:
        """First states of the episodes that every policy of a case is judged on."""
        return self.truth(recipe).starts(np.random.default_rng(_STARTS_SEED), STARTS)

    def judged(self, recipe: SplitRecipe, policy: Policy) -> Judged:
        """What a policy gets on the shared starts, judged on the measured table."""
        return judge(self.truth(recipe), policy, self.starts(recipe))

    def of(self, recipe: SplitRecipe) -> list[Run]:
        """One training for each seed, from memory where it was done before."""
        return [self._run(replace(recipe, seed=seed)) for seed in self.seeds]

    def learned(self, recipe: SplitRecipe) -> list[Judged]:
        """What the policy of each seed gets, judged on the measured table, in the order of the seeds."""
        truth = self.truth(recipe)
        return [self.judged(recipe, run.network.policy(truth)) for run in self.of(recipe)]

    def curve(self, recipe: SplitRecipe) -> Curve:
        """The mean sum of rewards over seeds, by decisions learnt from so far."""
        runs = self.of(recipe)
        both = [mean_and_interval(np.array(at)) for at in zip(*(r.returns for r in runs), strict=True)]
        return Curve(list(runs[0].steps), [m for m, _ in both], [h for _, h in both])

    def _run(self, recipe: SplitRecipe) -> Run:
        key = replace(recipe, name="")
        if key not in self._done:
            self._done[key] = self.before.of(repr(key), partial(self._trained, recipe))
        return self._done[key]

    def _trained(self, recipe: SplitRecipe) -> Run:
        self.tell(f"{recipe.name}, seed {recipe.seed}")
        quality = learned_from(
            recipe.rewards, self.measured(recipe.noise), self.surrogate, model=self.table.model,
            num_layers=self.table.num_layers, noise=recipe.noise, updates=recipe.measured_updates, seed=recipe.seed,
        )  # fmt: skip
        truth, starts = self.truth(recipe), self.starts(recipe)
        steps: list[int] = []
        returns: list[float] = []

        def look(done: int, network: SplitNetwork) -> None:
            if done * _LOOKS >= (len(steps) + 1) * recipe.steps:
                steps.append(done)
                returns.append(float(judge(truth, network.policy(truth), starts).returns.mean()))

        found = train(recipe, recipe.process(quality), look)
        return Run(found.network, found.seconds, steps, returns)


def spread(values: Sequence[float] | Floats, provenance: str = "simulated") -> Number:
    """Mean and 95 % interval (Student) as a figure of a report."""
    mean, half = mean_and_interval(np.asarray(values, float))
    text = f"{mean:.3f}" if np.isnan(half) else f"{mean:.3f} ± {half:.3f}"
    return Number(mean, "", provenance, text)  # type: ignore[arg-type]


def simulated(value: float) -> Number:
    """A figure of a simulation without a unit."""
    return Number(float(value), "", "simulated", f"{value:.3f}")
