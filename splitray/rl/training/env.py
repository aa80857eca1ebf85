"""One edge of the simulator as RLlib's MultiAgentEnv: two turns a slot, first layer_agent, then head_ffn_agent.

The other edges of its cloud do what the exact program says. An episode's first edge has the first turn.

Training uses `rollout.py` instead, which runs hundreds of instances at once; this is the same simulator behind RLlib's
own interface, for its checkers, its EnvRunner and other algorithms. Both agents get the whole team's reward.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from splitray.arrays import Ints
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.action import imitated
from splitray.rl.world.cell import references
from splitray.rl.world.rows import AGENTS, HEAD_FFN_AGENT, LAYER_AGENT, Layout, layouts
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import users_of

_LIMIT = 3.0  # of a feature
_MINE = np.array([0])  # the edge that the agents act for


def spaces_of(layout: Layout) -> tuple[gym.Space, gym.Space]:
    """What one agent sees and does."""
    sizes = [b.size for b in layout.blocks for _ in range(b.count)]
    return gym.spaces.Box(-_LIMIT, _LIMIT, (layout.width,), np.float32), gym.spaces.MultiDiscrete(sizes)


class PlacementEnv(MultiAgentEnv):
    """An episode is one weather of one of the recipe's cells, cut off at its end and never terminated."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """Take the recipe from `config["recipe"]`."""
        super().__init__()
        assert config is not None and isinstance(config["recipe"], Recipe), "env_config needs a Recipe as `recipe`"
        self.recipe: Recipe = config["recipe"]
        self.possible_agents = list(AGENTS)
        self.agents = list(AGENTS)
        both = {a: spaces_of(layout) for a, layout in layouts(self.recipe.spec).items()}
        self.observation_spaces = {a: s[0] for a, s in both.items()}
        self.action_spaces = {a: s[1] for a, s in both.items()}
        self._rng = np.random.default_rng(self.recipe.seed)
        self.instance: VectorEnv | None = None
        self._high: Ints | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """A new weather; a seed makes it and everything after it the same again."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        recipe, rng = self.recipe, self._rng
        cell = recipe.cells[rng.integers(len(recipe.cells))]
        climate = recipe.climates[rng.integers(len(recipe.climates))]
        self.instance = VectorEnv(
            cell, climate, spec=recipe.spec, num_slots=recipe.num_slots, rng=rng, weights=recipe.weights,
            num_instances=climate.users or users_of(references(cell.arch, cell.topology, climate.request)),
            leave_out=frozenset(recipe.leave_out),
        )  # fmt: skip
        self._high = None
        return {LAYER_AGENT: self.instance.high_rows(_MINE)[0]}, {}

    def step(  # type: ignore[override]  # RLlib's own differs from gymnasium's
        self, action_dict: dict[Any, Any]
    ) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
        """One turn; the second one of a slot serves it."""
        env = self.instance
        assert env is not None, "reset comes first"
        if self._high is None:
            self._high = np.asarray(action_dict[LAYER_AGENT], np.int64)[None]
            row = env.low_rows(self._high, _MINE)[0]
            going = {"__all__": False}
            return {HEAD_FFN_AGENT: row}, {LAYER_AGENT: 0.0}, going, going, {}
        low = np.asarray(action_dict[HEAD_FFN_AGENT], np.int64)[None]
        env.act(self._high, low, _MINE)
        for turn in env.turns:
            rest = turn[turn != _MINE[0]]
            if not len(rest):
                continue
            env.act(*imitated(env.spec, env.expert(rest), env.grid.num_heads), rest)
        outcome = env.serve()
        reward = float(outcome.rewards[0].sum())
        over = env.slot >= self.recipe.num_slots
        rows = {LAYER_AGENT: env.high_rows(_MINE)[0]}
        if over:
            rows[HEAD_FFN_AGENT] = env.low_rows(self._high, _MINE)[0]
        self._high = None
        terms = {name: float(values[0]) for name, values in outcome.terms.items()}
        infos = {LAYER_AGENT: {"terms": terms}}
        return rows, dict.fromkeys(AGENTS, reward), {"__all__": False}, {"__all__": over}, infos
