"""What stands for the parts of a model's ends that a device does not hold: nothing that comes out of them is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Zeros(nn.Module):
    """Stands for an embedding that this device does not hold; its sum is never used."""

    def __init__(self, hidden_dim: int, dtype: torch.dtype) -> None:
        """Return [1, 1, hidden_dim] zeros to every call."""
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, 1, hidden_dim, dtype=dtype), persistent=False)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Zeros that broadcast over batch and positions."""
        return self.zero  # type: ignore[return-value]


class Skip(nn.Module):
    """Stands for a head that this device does not hold."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """No logits at all: [batch, positions, 0]."""
        return hidden_states[..., :0]


def absent(child: nn.Module, hidden: int, dtype: torch.dtype) -> nn.Module:
    """Stands for a part of the ends that this device does not hold: what comes out of it is never used."""
    if isinstance(child, nn.ModuleList):
        return nn.ModuleList(absent(c, hidden, dtype) for c in child)
    return Zeros(hidden, dtype) if isinstance(child, nn.Embedding) else nn.Identity()
