"""Sums whose bits do not depend on who adds what in which order.

Each number is first rounded to a multiple of 2^-32 as a float64, which has room for sums of such up to 2^20: adding
them loses nothing, so that any order and any grouping gives the same sum. Where numbers are larger than that, the last
bit of a sum may depend on the order.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitray.arrays import Floats32

_LIFT = 1.5 * 2.0**20  # among the float64 of its size neighbours are 2^-32 apart

Floats64 = NDArray[np.float64]


def on_grid(x: Floats32) -> Floats64:
    """Numbers rounded to the grid, in memory of their own."""
    y = np.add(x, _LIFT, dtype=np.float64)
    y -= _LIFT
    return y


def lifted(y: NDArray[Any]) -> Floats64:
    """A partial sum on the grid: what is float64 is on it already."""
    return y if y.dtype == np.float64 else on_grid(y)


def tensor_on_grid(x: Tensor) -> Tensor:
    """As `on_grid`; what is float64 is on it already."""
    return x if x.dtype == torch.float64 else x.double().add_(_LIFT).sub_(_LIFT)
