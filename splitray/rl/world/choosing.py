"""From logits to actions, without a deep-learning library: blocks of categorical choices side by side.

Shapes: N instances; logits are [N, sum of count * size] over blocks, masked ones at -1e9 or below.
"""

import numpy as np

from splitray.arrays import Floats32, Ints
from splitray.rl.world.action import Block, spans

MASKED = -1e9  # as a logit: its probability is 0 in single precision


def gumbel(shape: tuple[int, ...], rng: np.random.Generator) -> Floats32:
    """Noise: the largest of logits with it added is a draw from their softmax."""
    return -np.log(rng.exponential(size=shape).astype(np.float32) + np.float32(1e-20))


def sample(blocks: tuple[Block, ...], logits: Floats32, noise: Floats32) -> tuple[Ints, Floats32]:
    """The action [N, choices] that `gumbel` noise [N, logits] draws, and its log-probability [N]."""
    actions = greedy(blocks, logits + noise)
    return actions, log_probability(blocks, logits, actions)


def greedy(blocks: tuple[Block, ...], logits: Floats32) -> Ints:
    """The likeliest choice of every block, [N, choices]."""
    each = [logits[:, at].reshape(-1, block.count, block.size).argmax(2) for block, at, _ in spans(blocks)]
    return np.concatenate(each, axis=1)


def log_probability(blocks: tuple[Block, ...], logits: Floats32, actions: Ints) -> Floats32:
    """Log-probability of an action, summed over its choices, [N]."""
    total = np.zeros(len(logits), np.float32)
    for block, at, choices in spans(blocks):
        x = logits[:, at].reshape(-1, block.count, block.size)
        x = x - x.max(2, keepdims=True)
        x = x - np.log(np.exp(x).sum(2, keepdims=True))
        total += np.take_along_axis(x, actions[:, choices, None], axis=2).sum((1, 2))
    return total
