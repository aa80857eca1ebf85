"""Activations of gated projections on rows: SiLU on numpy, any other by HF's own module.

Shapes: F columns here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from splitray.model.split_layer import Array

_LANES = 64  # four vectors of sixteen: as many as torch takes at once

Gate = Callable[[Array, Array], Array]


def gate_of(activation: nn.Module) -> Gate:
    """(gate, up) -> activation(gate) * up, in the memory of either."""
    if "SiLU" in type(activation).__name__:
        return _silu

    even = evenly(activation)

    def gate(gate_F: Array, up_F: Array) -> Array:
        up_F *= even(torch.from_numpy(gate_F)).numpy()
        return up_F

    return gate


def evenly(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An activation that computes each number to the same bits, wherever it stands and however many there are.

    torch takes another way for the numbers that are left over when its vectors are full, so none are left over.
    """

    def even(x: Tensor) -> Tensor:
        count = x.numel()
        full = x.new_zeros(-(-count // _LANES) * _LANES)
        full[:count] = x.reshape(-1)
        return activation(full)[:count].view(x.shape)

    return even


def _silu(gate_F: Array, up_F: Array) -> Array:
    up_F *= gate_F
    np.negative(gate_F, out=gate_F)
    np.exp(gate_F, out=gate_F)  # overflows to inf where silu is 0
    gate_F += 1
    up_F /= gate_F
    return up_F
