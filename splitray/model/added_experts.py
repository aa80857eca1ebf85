"""An FFN of experts as a plain sum: of what each chosen expert gives, and of a shared expert's blocks times a factor.

Where sums are made in fixed blocks, each of these is rounded to the grid before anything is added, so that it does not
matter which device has it. What else HF's module does (its router, a gate of the shared expert) stays its own code.

Shapes: N rows, D hidden, F columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from splitray.model.held_experts import HeldExperts
from splitray.model.lean.experts import stacked_experts
from splitray.model.split_layer import Array
from splitray.model.weights.held import held


@dataclass(slots=True)
class _Asked:
    """What HF's module asked its parts for, and what it makes of nothing from its experts and one from the shared."""

    experts: list[tuple[Tensor, ...]] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    factor: Tensor = field(default_factory=lambda: torch.empty(0))


class AddedExperts:
    """Takes the place of a module's forward; `added_experts` of the module is it."""

    def __init__(self, module: Any, experts: Any, shared: Any | None) -> None:
        """`shared` is the projection back from the columns of what every row goes through, if there is such a thing."""
        self._experts, self._shared = experts.forward, shared
        self._hidden = 0 if shared is None else shared.out_features
        self._plain_shared = None if shared is None else shared.forward
        self._own, self._asked = module.forward, _Asked()
        experts.forward = self._ask_experts
        if shared is not None:
            shared.forward = self._ask_shared
        module.forward, module.added_experts = self._forward, self

    def rows(self, x_ND: Array) -> Array:
        """What the module gives for rows, each with the choice of experts that it has alone."""
        asked = [self._ask(torch.from_numpy(x_D)[None, None]) for x_D in x_ND]
        experts = [tuple(torch.cat(parts) for parts in zip(*(a.experts[0] for a in asked), strict=True))]
        columns = [torch.cat([c.flatten(0, -2) for a in asked for c in a.columns])] if asked[0].columns else []
        return self._sum(_Asked(experts, columns, torch.cat([a.factor for a in asked]))).numpy()

    def _forward(self, x: Tensor) -> Tensor:
        """The sum alone: what else modules return is not read here."""
        return self._sum(self._ask(x)).view(x.shape)

    def _ask(self, x: Tensor) -> _Asked:
        self._asked = asked = _Asked()
        out = self._own(x)
        first = out[0] if isinstance(out, tuple | list) else out
        asked.factor = first.reshape(-1, x.shape[-1])
        return asked

    def _ask_experts(self, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        self._asked.experts.append((hidden_ND, chosen_NK, weights_NK))
        return torch.zeros_like(hidden_ND)

    def _ask_shared(self, x: Tensor) -> Tensor:
        self._asked.columns.append(x)
        return x.new_ones(*x.shape[:-1], self._hidden)

    def _sum(self, asked: _Asked) -> Tensor:
        (given,) = asked.experts
        total: Tensor = self._experts(*given)
        for x in asked.columns:
            rows, factor = x.flatten(0, -2), asked.factor
            few = held(self._shared)
            if few is not None:
                total = total + torch.from_numpy(few(rows.numpy(), factor.numpy()))
            elif self._plain_shared is not None:
                total = total + self._plain_shared(rows) * factor
        return total


def add_experts(module: nn.Module, sums: Sequence[nn.Module]) -> bool:
    """Let a module make its sum so, if it has the parts for it.

    `sums` are its projections that add up over devices. What the module does to its parts beside adding them is not
    seen here: whether it gives the same as before is to be tried.
    """
    experts = [m for m in module.modules() if stacked_experts(m) or isinstance(held(m), HeldExperts)]
    inside = {*module.modules()}
    shared: list[Any] = [m for m in sums if m in inside]
    if isinstance(module, nn.Sequential) or len(experts) != 1:
        return False
    if len(shared) > 1 or any(m.bias is not None for m in shared):
        return False
    AddedExperts(module, experts[0], shared[0] if shared else None)
    return True
