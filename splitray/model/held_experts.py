"""Stacked experts whose weights are held in any format, in the place of transformers' own.

Shapes: N rows, D hidden, K experts chosen for a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitray.arrays import Floats32
from splitray.model.lean.experts import expert_gate
from splitray.model.weights.halves import HalfLinear
from splitray.model.weights.held import HeldLinear
from splitray.model.weights.sums import Floats64, on_grid
from splitray.model.weights.unused_memory import give_back

Pair = tuple[HeldLinear | HalfLinear, HeldLinear | HalfLinear]
"""Of an expert: gate and up together, and down."""


class HeldExperts:
    """The experts of one device: what those that were chosen give for each row, times their weights, added up."""

    def __init__(self, module: Any, experts: Iterable[Pair], *, sums: bool) -> None:
        """`sums`: what each gives is rounded to the grid of model/weights/sums.py, where adding loses nothing."""
        self._experts, self._sums = [*experts], sums
        self.num_bytes = sum(linear.num_bytes for pair in self._experts for linear in pair)
        self._gate = expert_gate(module, self._experts[0][1].inputs)

    def __call__(self, x_ND: Floats32, chosen_NK: Any, weights_NK: Floats32) -> Floats32 | Floats64:
        """[N, D]; an expert of a higher number than are here is another device's."""
        total: Any = np.zeros(x_ND.shape, np.float64 if self._sums else np.float32)
        for expert in np.unique(chosen_NK).tolist():
            if expert >= len(self._experts):
                break
            both, down = self._experts[expert]
            rows, places = np.nonzero(chosen_NK == expert)
            y_ND: Any = down(np.stack([self._gate(row) for row in both(x_ND[rows])]))
            y_ND *= weights_NK[rows, places, None]
            total[rows] += on_grid(y_ND) if self._sums else y_ND
        return total  # type: ignore[no-any-return]


def hold_experts(module: Any, experts: HeldExperts) -> None:
    """Let a module of transformers compute by held experts; its own weights go."""
    module.held = experts
    for name, _ in list(module.named_parameters(recurse=False)):
        delattr(module, name)
    give_back()

    def forward(hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return torch.from_numpy(experts(hidden_ND.numpy(), chosen_NK.numpy(), weights_NK.numpy()))

    module.forward = forward
