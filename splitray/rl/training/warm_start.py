"""Clone the exact program into both agents before they learn for themselves: a supervised loop of seconds.

Where an agent may leave a decision to the program, cloning means to leave it; where there is no program, it means to
decide as it would. The agents see the states that the program itself leads to.
"""

from collections.abc import Mapping

import numpy as np
import torch

from splitray.arrays import Floats32, Ints
from splitray.rl.training.module import PlacementModule, choice_log_probabilities
from splitray.rl.training.recipe import Recipe
from splitray.rl.training.rollout import Collector
from splitray.rl.world.action import imitated, spans
from splitray.rl.world.rows import AGENTS, HEAD_FFN_AGENT, LAYER_AGENT, is_per_group

_LEARNING_RATE = 3e-3
_ROWS = 512  # a step
_CLOSE = 0.02  # nats of a whole action
_SLOTS = 32  # of every environment that is looked at


def clone(modules: Mapping[str, PlacementModule], recipe: Recipe, rng: np.random.Generator) -> dict[str, float]:
    """Train until the agents follow the program as surely as the recipe says, or for its number of steps.

    Returns:
        The mean probability of the program's own choices, by agent, and the steps that it took.
    """
    seen = _demonstrations(recipe, rng)
    found: dict[str, float] = {}
    for agent in AGENTS if recipe.spec.low_decides else (LAYER_AGENT,):
        module, (rows, actions) = modules[agent], seen[agent]
        x, target = torch.from_numpy(rows), torch.from_numpy(actions)
        optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
        enough = torch.log(_confidence(module, recipe))
        steps = 0
        while steps < recipe.clone_steps:
            at = torch.from_numpy(rng.integers(len(rows), size=_ROWS))
            each, _ = choice_log_probabilities(module.layout.blocks, module.logits(x[at]), target[at])
            lacking = (enough - each).clamp(min=0)  # a choice that is sure enough is left alone
            loss = lacking.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if float(loss.detach()) < _CLOSE:
                break
        with torch.no_grad():
            each, _ = choice_log_probabilities(module.layout.blocks, module.logits(x), target)
        found |= {f"{agent}_agreement": float(each.exp().mean()), f"{agent}_steps": float(steps)}
    return found


def _confidence(module: PlacementModule, recipe: Recipe) -> torch.Tensor:
    """Probability of each choice [C] at which cloning stops: many groups at once leave less room each."""
    sure = [
        1 - (1 - recipe.clone_confidence) / module.layout.num_groups
        if is_per_group(b, module.layout)
        else recipe.clone_confidence
        for b in module.layout.blocks
        for _ in range(b.count)
    ]
    return torch.tensor(sure)


def _demonstrations(recipe: Recipe, rng: np.random.Generator) -> dict[str, tuple[Floats32, Ints]]:
    """Rows of both agents with what the program does there."""
    collector = Collector(recipe, rng)
    found: dict[str, list[tuple[Floats32, Ints]]] = {a: [] for a in AGENTS}
    for env in collector.envs:
        for _ in range(_SLOTS):
            for rows in env.turns:
                high, low = imitated(recipe.spec, env.expert(rows), env.grid.num_heads)
                # Only what the masks allow can be shown: near a full memory the program may do more than they know.
                found[LAYER_AGENT].append((env.high_rows(rows), high))
                found[HEAD_FFN_AGENT].append((env.low_rows(high, rows), low))
                env.act(high, low, rows)
            env.serve()
    return {a: _legal(collector, a, pairs) for a, pairs in found.items()}


def _legal(collector: Collector, agent: str, pairs: list[tuple[Floats32, Ints]]) -> tuple[Floats32, Ints]:
    rows, actions = (np.concatenate(p) for p in zip(*pairs, strict=True))
    layout, fine = collector.layouts[agent], np.ones(len(rows), bool)
    masks = rows[:, layout.mask_at :]
    for block, at, choices in spans(layout.blocks):
        mask = masks[:, at].reshape(-1, block.count, block.size)
        fine &= (np.take_along_axis(mask, actions[:, choices, None], axis=2) > 0).all((1, 2))
    assert fine.any(), "the masks forbid everything that the program does"
    return rows[fine], actions[fine]
