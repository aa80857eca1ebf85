"""The FFN of one row: two gated projections on numpy, anything else by HF's own module.

Shapes: D hidden, F columns here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitray.model.kv_cache import KvCache, Place
from splitray.model.lean.activations import evenly, gate_of
from splitray.model.lean.experts import Experts, stacked_experts
from splitray.model.lean.linears import project
from splitray.model.lean.norms import norm_form, normed, row_norm
from splitray.model.slicing import features
from splitray.model.split_layer import Array, SplitLayer

_GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def read_ffn(layer: SplitLayer, hidden: int) -> GatedFfn | OwnFfn:
    """The FFN of a layer in the form that its module allows.

    Raises:
        NotLean: its norm has a form that is not known here.
    """
    module: Any = layer.ffn_module
    norm = row_norm(None if layer.ffn.norm is None else norm_form(layer.ffn.norm, hidden))
    children: dict[str, Any] = dict(module.named_children())
    linears = {n for n, m in children.items() if type(m) is nn.Linear}
    others = [m for n, m in children.items() if n not in linears]
    alike = len({children[n].bias is None for n in linears - {"down_proj"}}) == 1
    if linears in _GATED and alike and len(others) == 1 and not any(True for _ in others[0].parameters()):
        return GatedFfn(module, others[0], norm)
    return OwnFfn(module, norm)


class GatedFfn:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, module: Any, activation: nn.Module, norm: Callable[[Array], Array]) -> None:
        """`norm` comes before."""
        self._gates = [getattr(module, n) for n in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(module, n)]
        self._down = module.down_proj
        self.columns, self.norm = features(self._down, "in"), norm
        self._gate = gate_of(activation)

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout."""
        self._project, self._sum = project(self._gates), project((self._down,))

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        """This device's partial sum for a residual."""
        both = self._project(self.norm(x_D))
        return self._sum(self._gate(both[: self.columns], both[self.columns :]))

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        """As `partial` for rows."""
        rows = self._project(normed(self.norm, x_ND))
        return self._sum(np.stack([self._gate(both[: self.columns], both[self.columns :]) for both in rows]))


class OwnFfn:
    """HF's own module on one row, its linears and its experts transposed: a router costs little in torch."""

    def __init__(self, module: nn.Module, norm: Callable[[Array], Array]) -> None:
        """`norm` comes before."""
        self.module, self.norm = module, norm
        self._added = getattr(module, "added_experts", None)
        self.experts: list[Experts] = [Experts(m) for m in module.modules() if stacked_experts(m)]

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout."""
        for experts in self.experts:
            experts.take_over()
        for module in self.module.modules():
            if type(module) in (nn.Linear, Conv1D):
                project((module,))
            elif "activation" in type(module).__module__ or type(module).__module__.startswith("torch.nn.modules.act"):
                module.forward = evenly(module.forward)  # type: ignore[method-assign]

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        """As `partial` for rows, one by one: nobody knows what a module does with several, but for its experts."""
        if self._added is not None:
            return self._added.rows(normed(self.norm, x_ND))  # type: ignore[no-any-return]
        return np.stack([self.partial(x_D, place.cache) for x_D, place in zip(x_ND, places, strict=True)])

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        """This device's partial sum for a residual."""
        out = self.module(torch.from_numpy(self.norm(x_D))[None, None])
        y: Array = (out[0] if isinstance(out, tuple) else out).reshape(-1).numpy()
        return y
