"""The same training on one cell, over in a minute: whether everything is wired, not whether it learns."""

from rllib_configs.splitwise import CLIMATES
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.cell import Cell

CELL = Cell("jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head")


def splitwise_smoke(seed: int = 0) -> Recipe:
    """A few updates of small batches, with both agents deciding."""
    return Recipe(
        name="splitwise_smoke", seed=seed, variant="dp_modes", cells=(CELL,), climates=CLIMATES[:2], iterations=6,
        num_envs=2, num_instances=16, num_slots=64, rollout_slots=8, minibatch_slots=128, hidden=32, clone_steps=50,
    )  # fmt: skip
