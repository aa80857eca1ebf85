"""A matrix of few bits: whole numbers, a scale for each group of a row's inputs, and where that group's zero lies.

The layout is MatMulNBits' of onnxruntime, so that nothing is turned on the way from a file to the kernel.

Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32, Ints

Bytes = NDArray[np.uint8]
_AT_ONCE = 1 << 18  # weights that are rounded together: what lies between stays in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """value = (number - zero) * scale - minimum.

    Args:
        bits: of a number, 4 or 8.
        group: inputs that share a scale and a zero.
        numbers: the numbers of each group in `group * bits / 8` bytes; of two in a byte the first one is the low.
        scales: float32.
        zeros: packed like the numbers, row by row; None: every zero is the middle, 8 or 128.
        inputs: of a row, where the last group is not full.
        minima: float32 of each group, or None for none.
        order: which input of the matrix each of these is, where groups do not lie side by side in it (act-order).
    """

    bits: int
    group: int
    numbers: Bytes
    scales: Floats32
    zeros: Bytes | None
    inputs: int
    minima: Floats32 | None = None
    order: Ints | None = None

    @property
    def outputs(self) -> int:
        """Rows."""
        return len(self.numbers)

    @property
    def num_bytes(self) -> int:
        """Of numbers, scales, zeros and minima."""
        return sum(a.nbytes for a in self.arrays().values())

    def arrays(self) -> dict[str, Any]:
        """All that it consists of, by name."""
        names = ("numbers", "scales", "zeros", "minima", "order")
        return {n: a for n in names if (a := getattr(self, n)) is not None}

    def values(self) -> Floats32:
        """The matrix [O, I] in float32."""
        return self.rows(slice(None))

    def taken(self, ranges: Sequence[Range]) -> Quantised:
        """Some of the rows."""
        return self.picked(np.concatenate([np.arange(r.start, r.stop) for r in ranges]))

    def picked(self, which: Ints) -> Quantised:
        """Rows in this order."""
        return self._each(lambda a: a[which])

    def columns(self, r: Range) -> Quantised | None:
        """Some of the inputs; None where they begin or end within a group."""
        if r.start % self.group or (r.stop % self.group and r.stop != self.inputs):
            return None
        a, b = r.start // self.group, -(-r.stop // self.group)
        zeros = self.zeros
        if zeros is not None:
            zeros = _packed(_unpacked(zeros, self.bits)[:, a:b], self.bits)
        return replace(
            self,
            numbers=np.ascontiguousarray(self.numbers[:, a:b]),
            scales=np.ascontiguousarray(self.scales[:, a:b]),
            zeros=zeros,
            inputs=r.count,
            minima=None if self.minima is None else np.ascontiguousarray(self.minima[:, a:b]),
        )

    def rows(self, which: slice | Sequence[int]) -> Floats32:
        """Some rows in float32."""
        numbers = _unpacked(self.numbers[which], self.bits)
        rows, groups = self.scales[which].shape
        zeros: NDArray[np.uint8] | int = 1 << (self.bits - 1)
        if self.zeros is not None:
            zeros = _unpacked(self.zeros[which], self.bits)[:, :groups, None]
        values = np.subtract(numbers, zeros, dtype=np.float32) * self.scales[which][..., None]
        if self.minima is not None:
            values -= self.minima[which][..., None]
        values = values.reshape(rows, -1)[:, : self.inputs]
        if self.order is not None:
            turned = np.empty_like(values)
            turned[:, self.order] = values
            values = turned
        return values  # type: ignore[no-any-return]

    def _each(self, change: Callable[[Any], Any], *others: Quantised) -> Quantised:
        """All that has a row for each output, changed."""
        names = [n for n in self.arrays() if n != "order"]
        return replace(self, **{n: change(*(getattr(q, n) for q in (self, *others))) for n in names})


def alike(parts: Sequence[Quantised]) -> bool:
    """Whether matrices have one form, so that they can be joined."""
    forms = [(p.bits, p.group, p.inputs, *p.arrays()) for p in parts]
    orders: list[Any] = [p.order for p in parts]
    return forms.count(forms[0]) == len(forms) and all(np.array_equal(o, orders[0]) for o in orders)


def joined(parts: Sequence[Quantised]) -> Quantised:
    """Rows of matrices of one form, one below the other."""
    first = parts[0]
    return first if len(parts) == 1 else first._each(lambda *rows: np.concatenate(rows), *parts[1:])


def beside(parts: Sequence[Quantised]) -> Quantised:
    """Matrices with the same outputs as one with all their inputs; only the last may end within a group."""
    first, bits = parts[0], parts[0].bits
    if len(parts) == 1:
        return first
    assert all(p.group == first.group and p.inputs % p.group == 0 for p in parts[:-1]), "groups that are not full"
    zeros = None
    if first.zeros is not None:
        apart = [_unpacked(p.zeros, bits)[:, : p.scales.shape[1]] for p in parts if p.zeros is not None]
        zeros = _packed(np.concatenate(apart, axis=1), bits)
    minima = [p.minima for p in parts if p.minima is not None]
    return Quantised(
        bits=bits,
        group=first.group,
        numbers=np.concatenate([p.numbers for p in parts], axis=1),
        scales=np.concatenate([p.scales for p in parts], axis=1),
        zeros=zeros,
        inputs=sum(p.inputs for p in parts),
        minima=np.concatenate(minima, axis=1) if minima else None,
    )


def quantise(weight_OI: Tensor, *, bits: int, group: int) -> Quantised:
    """Round a matrix of any float type: 8 bits about the middle, 4 bits between each group's least and most.

    The scale of a group is then the one that leaves the least squared error with the numbers that were chosen. What is
    not finite leaves a scale that is not, so that nobody takes it for a weight.
    """
    outputs, inputs = weight_OI.shape
    groups = -(-inputs // group)
    step = max(1, _AT_ONCE // max(1, inputs))
    parts: list[tuple[Bytes, Floats32, Bytes | None]] = []
    for at in range(0, outputs, step):
        part_OI = weight_OI[at : at + step].float()
        if groups * group != inputs:
            part_OI = torch.nn.functional.pad(part_OI, (0, groups * group - inputs))
        numbers_OGK, scales_OG, zeros_OG = _rounded(part_OI.reshape(len(part_OI), groups, group), bits)
        zeros = None if zeros_OG is None else _packed(zeros_OG.numpy(), bits)
        parts.append((_packed(numbers_OGK.numpy(), bits), scales_OG.numpy(), zeros))
    numbers, scales, zeros_of = zip(*parts, strict=True)
    return Quantised(
        bits=bits,
        group=group,
        numbers=np.concatenate(numbers),
        scales=np.concatenate(scales),
        zeros=None if zeros_of[0] is None else np.concatenate(zeros_of),
        inputs=inputs,
    )


def _rounded(x_OGK: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers [O, G, K], scales [O, G] and zeros [O, G]."""
    if bits == 8:
        scale = x_OGK.abs().amax(-1, keepdim=True).div_(127)
        offset: Tensor | None = None
        q = (x_OGK / torch.where(scale == 0, 1, scale)).round_()
    else:
        least, most = x_OGK.amin(-1, keepdim=True), x_OGK.amax(-1, keepdim=True)  # aminmax is four times as slow
        scale = (most.clamp_(min=0) - least.clamp_(max=0)).div_(15)
        divisor = torch.where(scale == 0, 1, scale)
        offset = (-least / divisor).round_()
        q = (x_OGK / divisor).round_().add_(offset).clamp_(0, 15).sub_(offset)
    squares = (q * q).sum(-1, keepdim=True)
    best = (q * x_OGK).sum(-1, keepdim=True) / torch.where(squares == 0, 1, squares)
    scale = torch.where(scale.isfinite() & (best > 0), best, scale)
    zero = torch.full_like(scale, 128) if offset is None else offset
    numbers = q.add_(zero).nan_to_num_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return numbers, scale[..., 0], None if offset is None else offset[..., 0].nan_to_num_().to(torch.uint8)


def _packed(numbers: NDArray[np.uint8], bits: int) -> Bytes:
    """Numbers side by side along the last axis; a row of odd length ends with a zero."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(numbers).view("<u2")  # both of a byte at once
    packed: Bytes = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    return packed


def _unpacked(packed: Bytes, bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
