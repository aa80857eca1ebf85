"""Policies for the cut that learn nothing, the exact program among them, and how all policies are judged.

Shapes: as in process.py, and F relative perplexities that an episode may begin with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.rl.split_point.process import LEVELS, STEPS, SplitErrata, SplitPoint, States

Policy = Callable[[States], Ints]
"""An action for each of the states."""
_AT_ONCE = 500  # states whose trees are searched together


@dataclass(frozen=True, slots=True)
class Judged:
    """What a policy got: sums of rewards [N], and the strengths [T, N] that it saw and the cuts that it then chose."""

    returns: Floats
    noise: Floats
    cut: Ints


def judge(mdp: SplitPoint, policy: Policy, starts: States, seed: int = 0) -> Judged:
    """Play all episodes; the sum of an episode's rewards is not discounted, as in the paper.

    The same seed gives all policies the same exogenous channel.
    """
    rng, states = np.random.default_rng(seed), starts
    returns_N, noise, cuts = np.zeros(len(starts)), [], []
    for _ in range(STEPS):
        noise.append(states.noise)
        states, reward_N = mdp.step(states, policy(states), rng)
        returns_N += reward_N
        cuts.append(states.cut)
    return Judged(returns_N, np.array(noise), np.array(cuts))


def stay(mdp: SplitPoint) -> Policy:
    """The policy that never moves the cut."""
    named = SplitErrata.ABSOLUTE_ACTIONS in mdp.errata
    return lambda states: states.cut - 1 if named else np.zeros(len(states), np.int64)


def uniform(mdp: SplitPoint, rng: np.random.Generator) -> Policy:
    """The policy that draws any action with the same chance."""
    return lambda states: rng.integers(mdp.num_actions, size=len(states))


def greedy(mdp: SplitPoint) -> Policy:
    """The policy that takes the action of the best next reward."""
    return optimal(mdp, horizon=1)


def optimal(mdp: SplitPoint, *, horizon: int = STEPS) -> Policy:
    """The exact dynamic program, looking at most `horizon` steps ahead.

    An endogenous channel is certain, so that a tree of all actions is searched for each state; an exogenous one is a
    chain over levels, solved backwards for every perplexity that an episode may begin with.
    """
    if mdp.channel == "exogenous":
        return _of_chain(mdp, horizon)

    def choose(states: States) -> Ints:
        left = min(horizon, STEPS - states.step)
        parts = [states[i : i + _AT_ONCE] for i in range(0, len(states), _AT_ONCE)]
        return np.concatenate([_tree(mdp, part, left).argmax(1) for part in parts])

    return choose


def _tree(mdp: SplitPoint, states: States, left: int) -> Floats:
    """The most that is to come after each action, [N, A]; states that several ways lead to are followed once."""
    count, actions = len(states), mdp.num_actions
    each = np.repeat(np.arange(count), actions)
    after, value = mdp.step(states[each], np.tile(np.arange(actions), count))
    if left > 1:
        keys = np.stack([after.first, after.cut, np.round(after.noise, 12)], axis=1)
        _, rows, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        value = value + _tree(mdp, after[rows], left - 1).max(1)[back.ravel()]
    return value.reshape(count, actions)


def _of_chain(mdp: SplitPoint, horizon: int) -> Policy:
    cut_P = np.arange(1, mdp.last_cut + 1)
    grid_L, grid_P = (a.ravel() for a in np.meshgrid(np.arange(LEVELS), cut_P, indexing="ij"))
    relative_LP = mdp.relative(mdp.strength(grid_L), grid_P).reshape(LEVELS, -1)
    first_F = np.unique(relative_LP)
    reward_FLP = mdp.reward(relative_LP, cut_P, first_F[:, None, None])
    after_PA = mdp.target(cut_P[:, None], np.arange(mdp.num_actions)[None]) - 1
    value_FLP = np.zeros_like(reward_FLP)
    best: list[Ints] = []
    for _ in range(horizon):
        expected_FLP = np.einsum("ml,flp->fmp", mdp.transitions, reward_FLP + value_FLP)
        value_FLPA = expected_FLP[:, :, after_PA]
        best.append(value_FLPA.argmax(3))
        value_FLP = value_FLPA.max(3)

    def choose(states: States) -> Ints:
        after = np.clip(np.searchsorted(first_F, states.first), 1, len(first_F) - 1)
        nearer = states.first - first_F[after - 1] < first_F[after] - states.first
        left = min(horizon, STEPS - states.step)
        return best[left - 1][after - nearer, mdp.level(states.noise), states.cut - 1]

    return choose
