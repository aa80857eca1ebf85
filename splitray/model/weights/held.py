"""A linear whose weights are held in few bits, in the place of transformers' own.

Shapes: N rows, I inputs, O outputs, B blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitray.arrays import Floats32
from splitray.model.weights.halves import HalfLinear, HalfMatrix
from splitray.model.weights.quantised import Quantised
from splitray.model.weights.sums import Floats64, on_grid
from splitray.model.weights.unused_memory import give_back

Matrix = Quantised | HalfMatrix
_ROWS_AT_ONCE = 64  # of which sums of all blocks lie in the cache until they are added


class HeldLinear:
    """x W^T + bias for rows; with blocks of the inputs, a sum on the grid of sums.py that others' sums add up with."""

    def __init__(self, blocks: Sequence[Quantised], bias: Tensor | None, *, sums: bool) -> None:
        """`sums`: the outputs are partial sums in fixed blocks, as float64."""
        from splitray.model.weights.kernel import Kernel  # half a second that plain weights need not wait for

        self._order = blocks[0].order
        assert self._order is None or len(blocks) == 1, "an order is that of all inputs"
        self._kernel, self._sums, self._blocks = Kernel(blocks), sums, len(blocks)
        self.num_bytes, self.inputs = self._kernel.num_bytes, self._kernel.inputs
        given: Any = None if bias is None else bias.detach().float().numpy()
        self._bias: Any = on_grid(given) if sums and given is not None else given

    def __call__(self, x_NI: Floats32, factor_NO: Floats32 | None = None) -> Floats32 | Floats64:
        """[N, O]: each row as it would be alone; with `sums` a factor may count before anything is added."""
        x_NI = np.ascontiguousarray(x_NI if self._order is None else x_NI[:, self._order])
        y: Any
        if self._sums:
            y = np.empty((len(x_NI), self._kernel.outputs), np.float64)
            for at in range(0, len(x_NI), _ROWS_AT_ONCE):
                rows = slice(at, at + _ROWS_AT_ONCE)
                part: Any = self._kernel(x_NI[rows])
                part = on_grid(part if factor_NO is None else part * factor_NO[rows])
                y[rows] = part.sum(0) if self._blocks > 1 else part
        else:
            y = self._kernel(x_NI)
            y = y.sum(0) if self._blocks > 1 else y
        if self._bias is not None:
            y += self._bias
        return y  # type: ignore[no-any-return]


class BiasAlone:
    """What is left of a linear where a device has none of its inputs."""

    num_bytes = inputs = 0

    def __init__(self, outputs: int, bias: Tensor | None) -> None:
        """`bias` is None where another device adds it."""
        self._bias = torch.zeros(outputs) if bias is None else bias.detach().float()

    def __call__(self, x_NI: Floats32, factor_NO: Floats32 | None = None) -> Floats32:
        """[N, O]."""
        y: Floats32 = self._bias.repeat(len(x_NI), 1).numpy()
        return y if factor_NO is None else y * factor_NO


def linear_of(blocks: Sequence[Matrix], bias: Tensor | None, *, sums: bool) -> HeldLinear | HalfLinear:
    """The linear that multiplies by a matrix, or by blocks of one."""
    first = blocks[0]
    if isinstance(first, HalfMatrix):
        return HalfLinear(first, bias)
    return HeldLinear([b for b in blocks if isinstance(b, Quantised)], bias, sums=sums)


def hold(module: Any, linear: HeldLinear | HalfLinear | BiasAlone) -> None:
    """Let a linear of transformers compute by a held one; its own weight goes."""
    module.held = linear
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    module.bias = None
    give_back()

    def forward(x: Tensor) -> Tensor:
        y = torch.from_numpy(linear(x.flatten(0, -2).numpy()))
        return y.view(*x.shape[:-1], y.shape[-1])

    module.forward = forward


def held(module: object) -> Any:
    """What stands behind a module whose weights are held, of this file or `HeldExperts`; None where they are plain."""
    return getattr(module, "held", None)


class HeldTable:
    """Rows of an embedding in fewer bits."""

    def __init__(self, rows: Matrix) -> None:
        """`rows` stay as they are."""
        self._rows, self.num_bytes = rows, rows.num_bytes

    def __getitem__(self, token: int) -> Floats32:
        """One row, in memory of its own."""
        return self._rows.rows([token])[0]

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of tokens, without what a family does to them."""
        found = self._rows.rows(ids.reshape(-1).tolist())
        return torch.from_numpy(np.ascontiguousarray(found)).view(*ids.shape, -1)


def hold_table(embedding: Any, rows: Matrix) -> None:
    """Let an embedding of transformers take its rows from a held table: its own code gets those of a step alone."""
    table = embedding.held = HeldTable(rows)
    embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(ids: Tensor) -> Tensor:
        few = copy.copy(embedding)
        few._parameters = {"weight": nn.Parameter(table.rows(ids.reshape(-1)), requires_grad=False)}
        return type(embedding).forward(few, torch.arange(ids.numel()).view(ids.shape))  # type: ignore[no-any-return]

    embedding.forward = forward
