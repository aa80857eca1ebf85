"""Whole numbers with their scales and zeros, unpacked from what a checkpoint stores of some outputs and inputs.

Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32
from splitray.errors import ModelError
from splitray.model.weights.quantised import Bytes, Quantised, _packed

Read = Callable[[str, Range | None, Range | None], Tensor]
"""Of a stored tensor some rows and some columns; None: all, or there is no such axis."""
_GROUPS = (128, 64, 32, 16)  # that kernels read
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word of 32 bits, of eight neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """value = (number - zero of its group) * scale of its group.

    Args:
        bits: 4 or 8.
        numbers: [O, I].
        scales: [O, G].
        zeros: [O, G]; None: the middle, 8 or 128.
        group_of: the group of each input [I].
    """

    bits: int
    numbers: Bytes
    scales: Floats32
    zeros: Bytes | None
    group_of: NDArray[np.int64]

    def values(self) -> Floats32:
        """[O, I] in float32."""
        zeros: Any = 1 << (self.bits - 1) if self.zeros is None else self.zeros[:, self.group_of]
        return np.subtract(self.numbers, zeros, dtype=np.float32) * self.scales[:, self.group_of]  # type: ignore[no-any-return]

    def taken(self, inputs: NDArray[np.int64]) -> Slab:
        """Some of the inputs, in this order."""
        return replace(self, numbers=self.numbers[:, inputs], group_of=self.group_of[inputs])

    def quantised(self, most: int = _GROUPS[0]) -> Quantised:
        """The same values: the largest groups of at most `most` inputs that lie within the stored ones.

        Raises:
            ModelError: the stored groups have no part of 16 inputs or more.
        """
        outputs, inputs = self.numbers.shape
        for group in (g for g in _GROUPS if g <= most):
            firsts = self.group_of[::group]
            if np.array_equal(np.repeat(firsts, group)[:inputs], self.group_of):
                break
        else:
            raise ModelError("groups of quantised weights", expected="16 neighbouring inputs with one scale",
                             actual=f"{self.scales.shape[1]} groups of {inputs} inputs",
                             remedy="give --weights a format: float32 reads these weights too")  # fmt: skip
        numbers = np.full((outputs, len(firsts) * group), 1 << (self.bits - 1), np.uint8)
        numbers[:, :inputs] = self.numbers
        return Quantised(
            bits=self.bits,
            group=group,
            numbers=_packed(numbers.reshape(outputs, len(firsts), group), self.bits),
            scales=np.ascontiguousarray(self.scales[:, firsts]),
            zeros=None if self.zeros is None else _packed(self.zeros[:, firsts], self.bits),
            inputs=inputs,
        )


def unpacked(words: Tensor, bits: int, *, awq: bool = False, add: int = 0) -> Bytes:
    """Numbers of `bits` along the last axis, the first in the lowest bits of an int32 (in AWQ's order: `awq`).

    `add` is added to each word as to a whole: GPTQ's first version stores zeros less one so.
    """
    per = 32 // bits
    places = np.array(_AWQ_PLACES if awq else range(per), np.uint32)
    numbers = np.ascontiguousarray(words.numpy()).view(np.uint32) + np.uint32(add)
    apart = numbers[..., None] >> (places * np.uint32(bits)) & np.uint32((1 << bits) - 1)
    return apart.astype(np.uint8).reshape(*words.shape[:-1], words.shape[-1] * per)  # type: ignore[no-any-return]


def around(r: Range, each: int) -> Range:
    """The whole words (or groups) of `each` in which a range lies."""
    return Range(r.start // each, -(-r.stop // each))


def within(r: Range, each: int) -> slice:
    """Where a range begins and ends in what `around` it was read."""
    start = r.start - r.start // each * each
    return slice(start, start + r.count)


def groups_of(inputs: Range, group: int) -> NDArray[np.int64]:
    """The group of each input in a range, counted from the first one that is read."""
    return np.arange(inputs.start, inputs.stop) // group - inputs.start // group


def floats(tensor: Tensor) -> Floats32:
    """Scales in float32."""
    return tensor.float().numpy()  # type: ignore[no-any-return]


def side_by_side(slabs: Sequence[Slab]) -> Slab:
    """Slabs of the same outputs as one with all their inputs."""
    first = slabs[0]
    if len(slabs) == 1:
        return first
    starts = np.cumsum([0, *(s.scales.shape[1] for s in slabs)])
    zeros = [s.zeros for s in slabs if s.zeros is not None]
    return Slab(
        bits=first.bits,
        numbers=np.concatenate([s.numbers for s in slabs], axis=1),
        scales=np.concatenate([s.scales for s in slabs], axis=1),
        zeros=np.concatenate(zeros, axis=1) if zeros else None,
        group_of=np.concatenate([s.group_of + at for s, at in zip(slabs, starts, strict=False)]),
    )
