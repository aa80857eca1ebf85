"""Where to cut, slot by slot, while the channel changes: the decision process of Chen et al. (arXiv 2406.02616).

A state is the channel's strength and the cut p, the number of layers on the user's device; an action moves the cut by
at most u layers; an episode has five steps. Fading matters only by the loss that it causes, eq. (5), so one number is
the channel; the paper's code and its Fig. 7 use one as well (docs/equations.md C5).

The reward is the one that must have been run (docs/equations.md E3.5, inferred), as eq. (9) cannot give the sums of
Table 3:

    r = 10.5 (PPL_0 - PPL(s')) / PPL_0 + (p_max - p') / p_max        PPL_0: perplexity in the episode's first state

It depends on PPL_0, which is no function of the later states: ours shows it to the agent, with the step, as the process
ends. The channel moves by itself (`exogenous`: Gauss-Markov over evenly spaced levels) or by the actions (`endogenous`,
as coded: a layer more on the device makes a strength 0.9995 of itself).

Shapes: N episodes side by side, F features, A actions, L levels of the channel, P cuts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from splitray.arrays import Floats, Floats32, Ints
from splitray.errors import InputError
from splitray.rl.split_point.quality import Quality

Case = Literal["L", "H", "A", "coded"]
Channel = Literal["endogenous", "exogenous"]

STEPS = 5  # of an episode, Table 4
LAST_CUT = 10
QUALITY_WEIGHT, LOAD_WEIGHT = 10.5, 1.0
DRIFT = 0.0005  # of the strength, a layer
LEVELS = 31
_MEMORY = 0.9  # of the exogenous channel, a step
# Share of the strongest noise from and to, and half of the cuts: low, high, all; `coded` is the code's reset of A.
_CASES: dict[Case, tuple[float, float, str]] = {
    "L": (0.0, 1 / 3, "low"), "H": (1 / 3, 1.0, "high"), "A": (0.0, 1.0, "all"), "coded": (1 / 30, 1.0, "but the last"),
}  # fmt: skip


class SplitErrata(enum.Flag):
    """What the text prints or its code does, one switch each, all off in `CORRECTED`."""

    PRINTED_REWARD = enum.auto()  # E4: eq. (9), -(PPL + lambda C_UE), never above -1
    BARE_STATE = enum.auto()  # E10: (strength, p) unscaled, without PPL_0 and the step
    ABSOLUTE_ACTIONS = enum.auto()  # E11: an action names the cut; the channel moves by the sign only
    ONE_LAYER_MORE = enum.auto()  # E12: the channel lies behind layer p + 1
    UNEVEN_STEP = enum.auto()  # 3.4: three layers more move the channel as one does


CORRECTED = SplitErrata(0)
AS_PRINTED = SplitErrata.PRINTED_REWARD | SplitErrata.BARE_STATE
AS_CODED = SplitErrata.BARE_STATE | SplitErrata.ONE_LAYER_MORE | SplitErrata.UNEVEN_STEP
AS_CODED_MEASURED = SplitErrata.BARE_STATE | SplitErrata.ONE_LAYER_MORE | SplitErrata.ABSOLUTE_ACTIONS


@dataclass(frozen=True, slots=True)
class States:
    """Episodes at one step: strengths, cuts, and relative perplexities of the first states, each [N]."""

    noise: Floats
    cut: Ints
    first: Floats
    step: int = 0

    def __len__(self) -> int:
        return len(self.cut)

    def __getitem__(self, rows: slice | NDArray) -> States:
        return States(self.noise[rows], self.cut[rows], self.first[rows], self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPoint:
    """The decision process.

    Args:
        quality: relative perplexities, which the rewards are made of.
        reach: u, the layers that one action may move.
        case: where episodes begin: L weak channels and early cuts, H strong and late, A all.
        channel: how the strength changes.
        errata: what to do as printed or as coded.
        last_cut: p_max.
        perplexity: of the exact model; only the printed reward takes it.
        load_price: lambda C_UE(1) of the printed reward, in perplexities a layer; the paper does not give it (E13).

    Raises:
        InputError: a reach outside 1 to 4, or a last cut that the quality does not know.
    """

    quality: Quality
    reach: int = 1
    case: Case = "A"
    channel: Channel = "endogenous"
    errata: SplitErrata = CORRECTED
    last_cut: int = LAST_CUT
    perplexity: float = 1.0
    load_price: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.reach <= 4:
            remedy = "choose one of the paper's action spaces"
            raise InputError("reach of an action", expected="1 to 4 layers", actual=self.reach, remedy=remedy)
        if self.case not in _CASES:
            raise InputError("case", expected=f"one of {', '.join(_CASES)}", actual=self.case, remedy="choose one")
        known = self.quality.last_cut - (SplitErrata.ONE_LAYER_MORE in self.errata)
        if not 2 <= self.last_cut <= known:
            remedy = "measure later cuts, or give a smaller one"
            raise InputError("last cut", expected=f"2 to {known}", actual=self.last_cut, remedy=remedy)

    @property
    def moves(self) -> tuple[int, ...]:
        """Layers that each action moves, in the code's order: stay, -1, +1, -2, ..."""
        return (0, *(sign * k for k in range(1, self.reach + 1) for sign in (-1, 1)))

    @property
    def num_actions(self) -> int:
        """A, the number of actions."""
        return self.last_cut if SplitErrata.ABSOLUTE_ACTIONS in self.errata else len(self.moves)

    @property
    def num_features(self) -> int:
        """F, the number of features that the agent sees."""
        return 2 if SplitErrata.BARE_STATE in self.errata else 4

    def starts(self, rng: np.random.Generator, count: int) -> States:
        """First states of the case, drawn evenly."""
        low, high, part = _CASES[self.case]
        half = self.last_cut // 2
        first, last = {"low": (1, half), "high": (half + 1, self.last_cut), "all": (1, self.last_cut)}.get(
            part, (1, self.last_cut - 1)
        )
        noise_N = rng.uniform(low, high, count) * self.quality.strongest
        if self.channel == "exogenous":
            noise_N = self.strength(self.level(noise_N))
        cut_N = rng.integers(first, last + 1, count)
        return States(noise_N, cut_N, self.relative(noise_N, cut_N))

    def target(self, cut_N: Ints, action_N: Ints) -> Ints:
        """Where the cut is then: as far as it goes, if it cannot go that far."""
        if SplitErrata.ABSOLUTE_ACTIONS in self.errata:
            return action_N + 1
        return np.clip(cut_N + np.array(self.moves)[action_N], 1, self.last_cut)

    def step(self, states: States, action_N: Ints, rng: np.random.Generator | None = None) -> tuple[States, Floats]:
        """The next states and their rewards; an exogenous channel draws from `rng`."""
        cut_N = self.target(states.cut, action_N)
        if self.channel == "exogenous":
            assert rng is not None, "an exogenous channel is drawn"
            reached_NL = self.transitions.cumsum(1)[self.level(states.noise)]
            noise_N = self.strength((rng.random((len(states), 1)) > reached_NL[:, :-1]).sum(1))
        else:
            moved_N = (cut_N - states.cut).astype(float)
            if SplitErrata.ABSOLUTE_ACTIONS in self.errata:
                moved_N = np.sign(moved_N)
            elif SplitErrata.UNEVEN_STEP in self.errata:
                moved_N = np.where(moved_N == 3, 1.0, moved_N)
            noise_N = np.minimum(states.noise * (1 - DRIFT * moved_N), self.quality.strongest)
        relative_N = self.relative(noise_N, cut_N)
        reward_N = self.reward(relative_N, cut_N, states.first)
        return States(noise_N, cut_N, states.first, states.step + 1), reward_N

    def reward(self, relative: Floats, cut: Ints, first: Floats) -> Floats:
        """Reward of arriving at relative perplexities and cuts; the shapes must fit each other."""
        if SplitErrata.PRINTED_REWARD in self.errata:
            return -(self.perplexity * relative + self.load_price * cut)
        return QUALITY_WEIGHT * (1 - relative / first) + LOAD_WEIGHT * (self.last_cut - cut) / self.last_cut

    def observe(self, states: States) -> Floats32:
        """What the agent sees, [N, F]: strength and cut over their largest, log PPL_0, steps left over all."""
        if SplitErrata.BARE_STATE in self.errata:
            return np.stack([states.noise, states.cut], axis=1).astype(np.float32)
        left_N = np.full(len(states), 1 - states.step / STEPS)
        columns = [
            states.noise / self.quality.strongest,
            states.cut / self.last_cut,
            np.log(states.first),
            left_N,
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    # ------------------------------------------------------------------------------- the exogenous channel

    @property
    def transitions(self) -> Floats:
        """Chance of each level after each."""
        return _gauss_markov(LEVELS)

    def level(self, noise_N: Floats) -> Ints:
        """The nearest of the L levels of the channel, [N]."""
        return np.rint(noise_N / self.quality.strongest * (LEVELS - 1)).astype(np.int64)

    def strength(self, level_N: Ints) -> Floats:
        """Strength of the channel at a level, [N]."""
        return level_N / (LEVELS - 1) * self.quality.strongest

    def relative(self, noise_N: Floats, cut_N: Ints) -> Floats:
        """Relative perplexity at these strengths and cuts, [N]."""
        return self.quality.relative(noise_N, cut_N + (SplitErrata.ONE_LAYER_MORE in self.errata))


@lru_cache
def _gauss_markov(levels: int) -> Floats:
    """An AR(1) with the spread of even draws, as a chain over levels (Tauchen 1986); what lies beyond stays there."""
    from scipy.stats import norm

    middle, spread = (levels - 1) / 2, (levels - 1) / 12**0.5
    mean_L1 = middle + _MEMORY * (np.arange(levels)[:, None] - middle)
    edges = np.array([-np.inf, *(np.arange(levels - 1) + 0.5), np.inf])
    return np.diff(norm.cdf(edges, mean_L1, spread * (1 - _MEMORY**2) ** 0.5), axis=1)
