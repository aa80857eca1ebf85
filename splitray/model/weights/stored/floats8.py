"""Matrices of 8-bit floats with scales, and gpt-oss's experts in 4-bit floats (mxfp4).

fp8 has no exact form in whole numbers. Twice an mxfp4 value is a whole number up to 12, hence int8 in groups of 32.

Shapes: E experts, O outputs, I inputs, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32
from splitray.errors import ModelError
from splitray.model.weights.stored.method import StoredMethod
from splitray.model.weights.stored.slab import Read, Slab, around, floats, groups_of, within

Shapes = Mapping[str, tuple[int, ...]]
_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)  # of e2m1's values
_BYTES = np.arange(256)
_PAIRS = (np.stack([_TWICE[_BYTES & 15], _TWICE[_BYTES >> 4]], axis=-1) + 128).astype(np.uint8).view(np.uint16)[:, 0]
"""Of each byte its two numbers about the middle of 8 bits, side by side."""
_GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats8:
    """float8_e4m3fn [O, I] times the scale of each `block` of outputs and inputs."""

    module: str
    shape: tuple[int, int]
    block: tuple[int, int]
    keys: tuple[str, ...]

    def values(self, read: Read, outputs: Range, inputs: Range) -> Floats32:
        """Some outputs and inputs in float32, and no more scales than theirs."""
        rows, columns = self.block
        weight = floats(read(self.keys[0], outputs, inputs))
        stored = read(self.keys[1], None, None)
        scales = scales_of(stored)
        if scales.numel() == 1:
            return weight * floats(scales.reshape(1, 1))  # type: ignore[no-any-return]
        grid = floats(scales if scales.ndim == 2 else scales[:, None])
        row_of = np.arange(outputs.start, outputs.stop) // rows
        column_of = np.arange(inputs.start, inputs.stop) // columns
        return weight * grid[row_of][:, column_of]  # type: ignore[no-any-return]


def scales_of(stored: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two less 127."""
    if stored.dtype == torch.uint8:
        return torch.from_numpy(np.ldexp(np.float32(1), stored.numpy().astype(np.int32) - 127))
    return stored.float()


def fp8(module: str, shapes: Shapes, method: StoredMethod) -> Floats8:
    """Of `module.weight` with `weight_scale_inv` or `weight_scale`: one of a tensor, a channel or a block.

    Raises:
        ModelError: scales are missing, or are no grid over the weight.
    """
    key = f"{module}.weight"
    scale = next((k for k in (f"{key}_scale_inv", f"{key}_scale") if k in shapes), None)
    what = f"quantised weights {key}"
    remedy = "copy the checkpoint again"
    if scale is None:
        raise ModelError(what, expected="a tensor weight_scale_inv or weight_scale", actual="none", remedy=remedy)
    (outputs, inputs), grid = shapes[key], shapes[scale]
    block = _block((outputs, inputs), (*grid, 1)[:2] if grid else (1, 1), method.block)
    if block is None or len(grid) > 2:
        raise ModelError(what, expected=f"scales of equal blocks of {outputs} x {inputs}", actual=grid, remedy=remedy)
    more = f"{module}.weight_zero_point"
    return Floats8(module=module, shape=(outputs, inputs), block=block,
                   keys=(key, scale, *([more] if more in shapes else [])))  # fmt: skip


def _block(shape: tuple[int, int], grid: tuple[int, ...], said: tuple[int, int] | None) -> tuple[int, int] | None:
    """Blocks as the config says, where the last may be less than whole; else the equal ones that the grid makes."""
    if said and grid == tuple(-(-n // b) for n, b in zip(shape, said, strict=True)):
        return said
    if 0 in grid or any(n % g for n, g in zip(shape, grid, strict=True)):
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """Experts of gpt-oss: blocks [E, O, G, 16] of two numbers a byte, the low one first; exponents [E, O, G]."""

    module: str
    shape: tuple[int, int, int]
    keys: tuple[str, ...]

    def slab(self, read: Read, expert: int, outputs: Range, inputs: Range) -> Slab:
        """Some outputs and inputs of one expert, in whole numbers of 8 bits."""
        groups, of = around(inputs, _GROUP), Range(expert, expert + 1)
        blocks = read(self.keys[0], of, outputs)[0, :, groups.start : groups.stop].numpy()
        exponents = read(self.keys[1], of, outputs)[0, :, groups.start : groups.stop].numpy().astype(np.int32)
        numbers = np.take(_PAIRS, blocks).view(np.uint8).reshape(outputs.count, -1)
        return Slab(
            bits=8,
            numbers=numbers[:, within(inputs, _GROUP)],
            scales=np.ldexp(np.float32(1), exponents - 128),
            zeros=None,
            group_of=groups_of(inputs, _GROUP),
        )


def mxfp4(module: str, shapes: Shapes) -> Mxfp4:
    """Of `module_blocks` and `module_scales`.

    Raises:
        ModelError: one is missing, or they do not fit together.
    """
    keys = (f"{module}_blocks", f"{module}_scales")
    blocks, scales = (shapes.get(k, ()) for k in keys)
    if len(blocks) != 4 or blocks[3] * 2 != _GROUP or scales != blocks[:3]:
        expected = "blocks [experts, outputs, groups, 16] and their scales"
        raise ModelError(f"quantised weights {module}", expected=expected, actual=f"{blocks} and {scales}",
                         remedy="copy the checkpoint again")  # fmt: skip
    return Mxfp4(module=module, shape=(blocks[0], blocks[1], blocks[2] * _GROUP), keys=keys)
