"""Teach the layer agent what it could not see: what each candidate would have brought, tried out on the real future.

In training the future can be had: from a state all edges of a cloud go on under each candidate for some slots, with the
bandwidth and the requests that will come (`clairvoyant.py`). The agent, which sees the present and the past only, is
trained on the expected regret of its choices, with all candidates' outcomes at hand: a policy gradient without sampling
noise, for decisions that matter through what many do together, and where one edge's try is lost in the noise of all.
PPO goes on from there.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from splitray.arrays import Floats32
from splitray.rl.training.clairvoyant import CANDIDATES, ahead
from splitray.rl.training.learner import act_of
from splitray.rl.training.module import PlacementModule
from splitray.rl.training.recipe import Recipe
from splitray.rl.training.rollout import Collector
from splitray.rl.world.action import spans
from splitray.rl.world.rows import LAYER_AGENT
from splitray.rl.world.vector_env import VectorEnv

_LEARNING_RATE = 2e-3
_BETWEEN = 8  # slots
_MOST_REGRET = 2.0  # of the best candidate's cost
_KEPT_ROWS, _MINIBATCH, _UPDATES = 60_000, 2048, 8
_SURE = 0.01  # weight of the entropy
_ENVIRONMENTS = 8  # that are gone through in turn


def foresee(
    modules: dict[str, PlacementModule],
    recipe: Recipe,
    rng: np.random.Generator,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, float]:
    """Train on the recipe's number of branchings.

    Returns:
        The mean regret of the agent's choices over the last tenth, and that of the program's own.
    """
    module = modules[LAYER_AGENT]
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    small = replace(recipe, num_instances=min(64, recipe.num_instances), num_envs=_ENVIRONMENTS, copies=1)
    collector, act = Collector(small, rng), act_of(modules)
    rows, regrets = np.zeros((0, module.layout.width), np.float32), np.zeros((0, len(CANDIDATES)), np.float32)
    history: list[tuple[float, float]] = []
    for step in range(recipe.foresight_steps):
        collector.progress = step / recipe.foresight_steps
        env = collector.next_environment()
        regret = _regret(env, recipe)
        seen, pool = collector.one_slot(env, act)
        rows = np.concatenate([rows, seen])[-_KEPT_ROWS:]
        regrets = np.concatenate([regrets, regret[pool]])[-_KEPT_ROWS:]
        for _ in range(_BETWEEN - 1):
            collector.one_slot(env, act)
        for _ in range(_UPDATES):
            at = rng.integers(len(rows), size=min(_MINIBATCH, len(rows)))
            chances = _chances(module, torch.from_numpy(rows[at]))
            expected = (chances * torch.from_numpy(regrets[at])).sum(1).mean()
            sureness = (chances * chances.clamp(min=1e-9).log()).sum(1).mean()
            optimizer.zero_grad()
            (expected + _SURE * sureness).backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - 0.9 * step / recipe.foresight_steps)
        if len(seen):
            with torch.no_grad():
                mine = (_chances(module, torch.from_numpy(seen)).numpy() * regret[pool]).sum(1).mean()
            history.append((float(mine), float(regret[pool, 0].mean())))
        told(step + 1, recipe.foresight_steps)
    last = np.array(history[-max(1, len(history) // 10) :]).mean(0)
    return {"regret": float(last[0]), "regret_of_the_program": float(last[1])}


def _regret(env: VectorEnv, recipe: Recipe) -> Floats32:
    """What each candidate would cost each cloud more than the best one does, over that one's cost, [P, candidates]."""
    cost = ahead(env, recipe.foresight_slots).T
    best = cost.min(1, keepdims=True)
    return np.minimum((cost - best) / np.maximum(best, 1e-6), _MOST_REGRET).astype(np.float32)


def _chances(module: PlacementModule, rows: torch.Tensor) -> torch.Tensor:
    """Probability of each candidate: that of its weight of moves times that of its price, [B, candidates]."""
    logits = module.logits(rows)
    blocks = [(block.name, at) for block, at, _ in spans(module.layout.blocks) if block.count == 1]
    log_p = {name: torch.log_softmax(logits[:, at], dim=1) for name, at in blocks}
    stay, price = ([c[i] for c in CANDIDATES] for i in (1, 2))
    joint = log_p["stay"][:, stay] + log_p["price"][:, price]
    return torch.softmax(joint, dim=1)
