"""Collect what a policy does in several cells at once, and what it should have expected.

Knows neither RLlib nor torch: a policy is a function from an agent's rows to logits and values.
Advantages are generalised advantage estimates of both parts of the reward. Instances that share their weather are
each other's baseline: what the arrivals and the link did to all of them is no merit of one action (an input-driven
baseline, Mao et al. 2019, arXiv 1807.02264; it depends on no action of the instance itself, so it biases nothing).
The noise that draws actions is held for some slots, as gSDE holds its own (Raffin et al. 2021, arXiv 2005.05719): a
choice that the next slot takes back pays for two moves and shows nothing of what keeping to it would bring.

Shapes: E environments of N instances, M = E N, S slots, C choices, W width of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Bools, Floats, Floats32, Ints
from splitray.rl.grid.grid import Grid
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.choosing import gumbel, sample
from splitray.rl.world.reward import TERMS
from splitray.rl.world.rows import AGENTS, HEAD_FFN_AGENT, LAYER_AGENT, layouts
from splitray.rl.world.vector_env import VectorEnv

_LEAST = 0.05  # share of slots in which a choice matters, below which it counts no more for being rare
Act = Callable[[str, Floats32], tuple[Floats32, Floats32]]
"""An agent's name and its rows [M, W] to logits [M, ..] and the two values [M, 2]."""
Decided = tuple[Floats32, Ints, Floats32, Floats32]
"""Rows, actions, their log-probabilities and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One agent's part of a rollout, slots of all instances flattened, [S M, ..]."""

    rows: Floats32
    actions: Ints
    log_probability: Floats32
    advantages: Floats32
    targets: Floats32  # [.., 2], of the values


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What both agents did, and means over slots: every term of the reward, their sum, moves."""

    samples: dict[str, Sample]
    means: dict[str, float]


class Scale:
    """The running standard deviation of discounted rewards, which rewards are divided by."""

    def __init__(self, gamma: float) -> None:
        """No value seen yet."""
        self.gamma, self.count, self.mean, self.squares = gamma, 1e-4, 0.0, 1e-4

    def update(self, returns: Floats) -> None:
        """Take in returns, [M] (Welford, in batches)."""
        n, mean = len(returns), float(returns.mean())
        delta, total = mean - self.mean, self.count + n
        self.squares += float(((returns - mean) ** 2).sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation of the values seen so far, never 0."""
        return max(1e-3, float(np.sqrt(self.squares / self.count)))


class Collector:
    """Environments that live on from one rollout to the next; each is drawn anew when its weather is over."""

    def __init__(self, recipe: Recipe, rng: np.random.Generator) -> None:
        """Draw the first environments, with staggered ends."""
        self.recipe, self.rng, self.progress = recipe, rng, 0.0
        self.layouts = layouts(recipe.spec)
        self.scales: dict[str, Scale] = {}
        self._noise: dict[str, Floats32] = {}
        self._grids: dict[str, Grid] = {}
        self._returns = np.zeros((recipe.num_envs, recipe.num_instances))
        self._next_cell, self._renew_at = 0, -1
        self.envs = [self._drawn() for _ in range(recipe.num_envs)]
        self._ends = [
            max(1, recipe.num_slots // recipe.rollout_slots * (i + 1) // recipe.num_envs)
            for i in range(recipe.num_envs)
        ]

    def _drawn(self) -> VectorEnv:
        """The next cell under a climate that the curriculum has opened."""
        recipe, rng = self.recipe, self.rng
        if self._next_cell % len(recipe.cells) == 0:
            self._order = rng.permutation(len(recipe.cells))
        cell = recipe.cells[self._order[self._next_cell % len(recipe.cells)]]
        self._next_cell += 1
        share = min(1.0, recipe.open_at_start + 2 * (1 - recipe.open_at_start) * self.progress)
        climate = recipe.climates[rng.integers(max(1, round(share * len(recipe.climates))))]
        if cell.name not in self._grids:
            self._grids[cell.name] = Grid(cell.arch, cell.topology, groups=recipe.num_groups)
        return VectorEnv(
            cell, climate, spec=recipe.spec, rng=rng, weights=recipe.weights, leave_out=frozenset(recipe.leave_out),
            grid=self._grids[cell.name], num_instances=recipe.num_instances, num_slots=recipe.num_slots,
            copies=recipe.copies,
        )  # fmt: skip

    def next_environment(self) -> VectorEnv:
        """One of those that are there, in turn; it is drawn anew when its time is over."""
        self._renew_at = (self._renew_at + 1) % len(self.envs)
        i = self._renew_at
        if self.envs[i].slot >= self.recipe.num_slots:
            self.envs[i] = self._drawn()
        return self.envs[i]

    def one_slot(self, env: VectorEnv, act: Act) -> tuple[Floats32, Ints]:
        """Go on for a slot under the layer agent alone: its rows where someone waits, and their clouds."""
        rows, pools = [], []
        for turn in env.turns:
            seen = env.high_rows(turn)
            logits, _ = act(LAYER_AGENT, seen)
            waits = env.simulator.next_tokens[turn] > 1
            rows.append(seen[waits])
            pools.append(env.weather.pool[turn[waits]])
            actions, _ = sample(self.layouts[LAYER_AGENT].blocks, logits, gumbel(logits.shape, self.rng))
            env.act(actions, None, turn)
        env.serve()
        return np.concatenate(rows), np.concatenate(pools)

    def collect(self, act: Act) -> Rollout:
        """Go on for the recipe's slots under a policy."""
        recipe, slots = self.recipe, self.recipe.rollout_slots
        self._renew()
        agents = AGENTS if recipe.spec.low_decides else (LAYER_AGENT,)
        kept: dict[str, list[Decided]] = {a: [] for a in agents}
        rewards, moved = [], 0.0
        mattered = np.zeros((slots, recipe.num_envs * recipe.num_instances), bool)
        totals = dict.fromkeys(TERMS, 0.0)
        for t in range(slots + 1):  # the last one is for the values only
            self._decide(act, kept, acting=t < slots)
            if t == slots:
                break
            now = []
            for i, env in enumerate(self.envs):
                rows = slice(i * recipe.num_instances, (i + 1) * recipe.num_instances)
                outcome = env.serve()
                mattered[t, rows] = outcome.mattered
                now.append(self._scaled(i, outcome.rewards))
                moved += float(outcome.moved.mean())
                for name, values in outcome.terms.items():
                    totals[name] += float(values.mean())
            rewards.append(np.concatenate(now))
        many = slots * recipe.num_envs
        means = {name: value / many for name, value in totals.items()}
        means |= {"reward": sum(means.values()), "moves": moved / many, "mattered": mattered.mean()}
        reward_SM2 = np.stack(rewards)
        return Rollout(samples={a: self._sample(k, reward_SM2, mattered) for a, k in kept.items()}, means=means)

    def _decide(self, act: Act, kept: dict[str, list[Decided]], *, acting: bool) -> None:
        """All turns of a slot in all environments; without acting it is one turn, for the values."""
        recipe, n = self.recipe, self.recipe.num_instances
        turns = [e.turns if acting else [np.arange(n)] for e in self.envs]
        parts: dict[str, list[tuple[Ints, Decided]]] = {a: [] for a in kept}
        for turn in range(max(len(t) for t in turns)):
            there = [(i, e, turns[i][turn]) for i, e in enumerate(self.envs) if turn < len(turns[i])]
            at = np.concatenate([i * n + rows for i, _, rows in there])
            ends = np.cumsum([len(rows) for _, _, rows in there])[:-1]
            rows = np.concatenate([e.high_rows(rows) for _, e, rows in there])
            high = np.split(self._choose(LAYER_AGENT, rows, at, act, parts), ends)
            low: list[Ints] | None = None
            if recipe.spec.low_decides:
                rows = np.concatenate([e.low_rows(h, rows) for (_, e, rows), h in zip(there, high, strict=True)])
                low = np.split(self._choose(HEAD_FFN_AGENT, rows, at, act, parts), ends)
            if acting:
                for k, (_, env, mine) in enumerate(there):
                    env.act(high[k], None if low is None else low[k], mine, judged=True)
        for agent, found in parts.items():
            order = np.argsort(np.concatenate([at for at, _ in found]))
            columns = zip(*(d for _, d in found), strict=True)
            kept[agent].append(tuple(np.concatenate(c)[order] for c in columns))  # type: ignore[arg-type]

    def _choose(
        self, agent: str, rows: Floats32, at: Ints, act: Act, parts: dict[str, list[tuple[Ints, Decided]]]
    ) -> Ints:
        logits, values = act(agent, rows)
        everyone = self.recipe.num_envs * self.recipe.num_instances, logits.shape[1]
        noise = self._noise.setdefault(agent, gumbel(everyone, self.rng))
        fresh = at[self.rng.random(len(at)) * self.recipe.held_slots < 1]
        noise[fresh] = gumbel((len(fresh), noise.shape[1]), self.rng)
        actions, log_probability = sample(self.layouts[agent].blocks, logits, noise[at])
        parts[agent].append((at, (rows, actions, log_probability, values)))
        return actions

    def _scaled(self, i: int, rewards: Floats) -> Floats:
        """An environment's rewards over the running deviation of its cell and climate."""
        recipe, env = self.recipe, self.envs[i]
        self._returns[i] = recipe.gamma * self._returns[i] + rewards.sum(1)
        scale = self.scales.setdefault(f"{env.cell.name} {env.climate}", Scale(recipe.gamma))
        scale.update(self._returns[i])
        scaled: Floats = rewards / scale.deviation
        return scaled if recipe.dual else np.stack([scaled.sum(1), np.zeros(len(scaled))], axis=1)

    def _sample(self, kept: list[Decided], rewards: Floats, mattered: Bools) -> Sample:
        recipe, slots = self.recipe, len(rewards)
        values = np.stack([k[3] for k in kept]).astype(float)
        advantages = np.zeros_like(rewards)
        ahead = np.zeros_like(rewards[0])
        for t in reversed(range(slots)):
            surprise = rewards[t] + recipe.gamma * values[t + 1] - values[t]
            ahead = surprise + recipe.gamma * recipe.trace_decay * ahead
            advantages[t] = ahead
        targets = advantages + values[:-1]
        summed = advantages[..., 0] + recipe.beta * advantages[..., 1]
        parts = np.split(summed, recipe.num_envs, axis=1)
        summed = np.concatenate([_over_copies(p, e.copies) for p, e in zip(parts, self.envs, strict=True)], axis=1)
        if mattered.any():  # what led nowhere else has no merit, and its noise would drown the rest
            some = summed[mattered]
            scaled = (summed - some.mean()) / (some.std() + 1e-6) / max(mattered.mean(), _LEAST)
            summed = np.where(mattered, scaled, 0.0)
        flat = slots * rewards.shape[1]
        return Sample(
            rows=np.stack([k[0] for k in kept[:-1]]).reshape(flat, -1),
            actions=np.stack([k[1] for k in kept[:-1]]).reshape(flat, -1),
            log_probability=np.stack([k[2] for k in kept[:-1]]).reshape(flat).astype(np.float32),
            advantages=summed.reshape(flat).astype(np.float32),
            targets=targets.reshape(flat, 2).astype(np.float32),
        )

    def _renew(self) -> None:
        """Draw environments anew whose time is over."""
        for i, left in enumerate(self._ends):
            if left <= 0:
                self.envs[i] = self._drawn()
                self._returns[i] = 0.0
                self._ends[i] = self.recipe.num_slots // self.recipe.rollout_slots
            self._ends[i] -= 1


def _over_copies(advantages: Floats, copies: int) -> Floats:
    """Less the mean of the other copies of the same weather, [S, N]; as they are where there is one."""
    if copies == 1:
        return advantages
    alike = advantages.reshape(len(advantages), copies, -1)
    others = (alike.sum(1, keepdims=True) - alike) / (copies - 1)
    return (alike - others).reshape(advantages.shape)
