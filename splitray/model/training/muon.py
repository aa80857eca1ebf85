"""Muon: an optimiser of matrices that needs few tokens."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def _orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Push the singular values of a stack of matrices towards 1 (quintic Newton-Schulz iteration)."""
    x = update.mT if update.size(-2) > update.size(-1) else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if update.size(-2) > update.size(-1) else x


class Muon:
    """Momentum whose step is made orthogonal, for the matrices of the blocks.

    Needs fewer tokens than AdamW here, which is what a training on one CPU core has least of. Matrices of
    one shape are stepped together, and in float32: half precision is slow on many CPUs.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], decay: float):
        self.decay = decay
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Step every matrix by its gradient at this learning rate and drop the gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = _orthogonal(gradient.lerp(momentum, 0.95))
            scale = rate * math.sqrt(max(1.0, update.size(-2) / update.size(-1)))
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=scale)
                parameter.grad = None
