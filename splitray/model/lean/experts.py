"""Experts whose weights are stacked, for one row: only the chosen ones that are held are multiplied.

Shapes: D hidden, E experts here, F columns of one, K experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from splitray.model.lean.activations import gate_of
from splitray.model.lean.linears import array, transpose_experts
from splitray.model.split_layer import Array

_WEIGHTS = {"gate_up_proj", "down_proj"}
_BIASES = {"gate_up_proj_bias", "down_proj_bias"}


def stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers stacks them, with a gate."""
    names = {n for n, _ in module.named_parameters(recurse=False)}
    gated = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", False)
    return bool(gated) and names in (_WEIGHTS, _WEIGHTS | _BIASES) and hasattr(module, "is_transposed")


class Experts:
    """Takes HF's place where one row goes through a module of experts; prompts and batches go through HF's code."""

    def __init__(self, module: Any) -> None:
        """Change nothing before `take_over`."""
        self.module = module

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout, and compute single rows from now on."""
        module = self.module
        self.weights_EDF = transpose_experts(module, "gate_up_proj")
        self.outs_EFD = transpose_experts(module, "down_proj")
        self.biases_EF: Array | None = array(getattr(module, "gate_up_proj_bias", None))
        self.out_biases_ED: Array | None = array(getattr(module, "down_proj_bias", None))
        self._gate = expert_gate(module, self.outs_EFD.shape[1])
        self._many, module.forward = module.forward, self._forward

    def _forward(self, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if len(hidden_ND) != 1:
            return self._many(hidden_ND, chosen_NK, weights_NK)  # type: ignore[no-any-return]
        x_D = hidden_ND[0].numpy()
        total: Tensor = torch.zeros_like(hidden_ND)
        sum_D: Array = total[0].numpy()
        for expert, weight in zip(chosen_NK[0].tolist(), weights_NK[0].tolist(), strict=True):
            if expert >= len(self.weights_EDF):  # another device has it
                continue
            both = x_D @ self.weights_EDF[expert]
            if self.biases_EF is not None:
                both += self.biases_EF[expert]
            y_D = self._gate(both) @ self.outs_EFD[expert]
            if self.out_biases_ED is not None:
                y_D += self.out_biases_ED[expert]
            y_D *= weight
            sum_D += y_D
        return total


def expert_gate(module: Any, columns: int) -> Callable[[Array], Array]:
    """From the joint outputs of both projections to what goes into the last one; a family may do it in its own way."""
    if type(module)._apply_gate.__module__ != moe.__name__:
        return lambda both: module._apply_gate(torch.from_numpy(both)[None])[0].numpy()
    gate = gate_of(module.act_fn)
    return lambda both: gate(both[:columns], both[columns:])
