"""Matrices of 16 bits a weight, which multiply in float32.

FBGEMM's kernel, behind torch's `linear_dynamic_fp16`, widens float16 weights as it reads them. A bfloat16 matrix is
lifted by a power of two into the range of float16, where all of its numbers but the least ones are the same; those few
are multiplied apart, so that nothing is lost. Where torch has no such kernel (it is there on x86), tiles are widened.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32

_LARGEST = 15  # a float16 reaches just below 2^16
_TILE = 1 << 16  # weights that are widened together: their floats stay in the second cache
_MOST_APART = 4096


@dataclass(frozen=True, slots=True)
class HalfMatrix:
    """[O, I] in bfloat16 or float16."""

    weight: Tensor

    @property
    def num_bytes(self) -> int:
        """Two a weight."""
        return self.weight.nbytes

    def rows(self, which: slice | Sequence[int]) -> Floats32:
        """Some rows in float32."""
        return self.weight[which].float().numpy()  # type: ignore[no-any-return]

    def taken(self, ranges: Sequence[Range]) -> HalfMatrix:
        """Some of the rows; one range of them in the same memory."""
        parts = [self.weight[r.start : r.stop] for r in ranges]
        return HalfMatrix(parts[0] if len(parts) == 1 else torch.cat(parts))


class HalfLinear:
    """x W^T + bias for rows in float32."""

    def __init__(self, matrix: HalfMatrix, bias: Tensor | None) -> None:
        """The kernel keeps a copy of its own."""
        self.num_bytes, self.inputs = matrix.num_bytes, matrix.weight.shape[1]
        self._bias: Any = None if bias is None else bias.detach().float().numpy()
        self._multiply = (has_kernel() and _packed(matrix.weight)) or _Tiles(matrix.weight)

    def __call__(self, x_NI: Floats32) -> Floats32:
        """[N, O]."""
        y: Any = self._multiply(np.ascontiguousarray(x_NI))
        if self._bias is not None:
            y += self._bias
        return y  # type: ignore[no-any-return]


@cache
def has_kernel() -> bool:
    """Whether torch has FBGEMM's kernel for float16 weights on this machine."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.zeros(8, 8), None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


class _Packed:
    """By FBGEMM, with the few numbers apart that float16 does not have."""

    def __init__(self, packed: Any, lift: float, apart: tuple[Any, Any, Any]) -> None:
        self._packed, self._back = packed, np.float32(1 / lift)
        self._rows, self._columns, self._values = apart

    def __call__(self, x_NI: Floats32) -> Floats32:
        y: Any = torch.ops.quantized.linear_dynamic_fp16(torch.from_numpy(x_NI), self._packed).numpy()
        if self._back != 1:
            y *= self._back
        if len(self._rows):
            where: Any = (slice(None), self._rows)
            np.add.at(y, where, x_NI[:, self._columns] * self._values)
        return y  # type: ignore[no-any-return]


def _packed(weight_OI: Tensor) -> _Packed | None:
    """None where too many numbers lie outside of what one lift brings into float16."""
    most = max(abs(float(v)) for v in weight_OI.aminmax()) if weight_OI.numel() else 0.0
    if not math.isfinite(most):
        return None
    lift = 1.0
    if weight_OI.dtype != torch.float16 and most > 0:
        lift = 2.0 ** min(126, _LARGEST - math.frexp(most)[1])
    lifted = weight_OI.float().mul_(lift)
    tiles = lifted.split(max(1, _TILE // max(1, weight_OI.shape[1])))
    rows, columns = torch.nonzero(torch.cat([t.half().float() != t for t in tiles]), as_tuple=True)
    if len(rows) > _MOST_APART:
        return None
    values = weight_OI[rows, columns].float().numpy()
    lifted[rows, columns] = 0
    packed = torch.ops.quantized.linear_prepack_fp16(lifted, None)
    return _Packed(packed, lift, (rows.numpy(), columns.numpy(), values))


class _Tiles:
    """Some rows at a time, widened."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight, self._at_once = weight_OI.contiguous(), max(1, _TILE // max(1, weight_OI.shape[1]))

    def __call__(self, x_NI: Floats32) -> Floats32:
        y_NO = np.empty((len(x_NI), len(self._weight)), np.float32)
        for at in range(0, len(self._weight), self._at_once):
            tile = self._weight[at : at + self._at_once].float().numpy()
            np.matmul(x_NI, tile.T, out=y_NO[:, at : at + len(tile)])
        return y_NO
