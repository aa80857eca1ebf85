"""Activations of gated projections on rows: SiLU on numpy, any other by HF's own module.

Shapes: F columns here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from splitray.model.split_layer import Array

Gate = Callable[[Array, Array], Array]


def gate_of(activation: nn.Module) -> Gate:
    """(gate, up) -> activation(gate) * up, in the memory of either."""
    if "SiLU" in type(activation).__name__:
        return _silu

    def gate(gate_F: Array, up_F: Array) -> Array:
        up_F *= activation(torch.from_numpy(gate_F)).numpy()
        return up_F

    return gate


def _silu(gate_F: Array, up_F: Array) -> Array:
    up_F *= gate_F
    np.negative(gate_F, out=gate_F)
    np.exp(gate_F, out=gate_F)  # overflows to inf where silu is 0
    gate_F += 1
    up_F /= gate_F
    return up_F
