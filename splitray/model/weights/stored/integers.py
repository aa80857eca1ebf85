"""Matrices that are stored as whole numbers with scales: AWQ, GPTQ, compressed-tensors.

The layouts are those of AutoAWQ (its gemm and gemv modules), AutoGPTQ and GPTQModel, and the compressed-tensors
library. GPTQ's first version stores zeros less one, taken from whole words: adding one to each number of a word as to
a whole gives them back, a zero of 0 included.

Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.weights.stored.method import StoredMethod
from splitray.model.weights.stored.slab import Read, Slab, around, floats, groups_of, unpacked, within

Shapes = Mapping[str, tuple[int, ...]]
_ONES = {4: 0x11111111, 8: 0x01010101}  # one for each number of a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """One matrix: its name without what its tensors are called by, and how they lie.

    Args:
        kind: `awq`, `awq_gemv`, `gptq`, `packed` (words of compressed-tensors) or `bytes` (its int8).
        shape: outputs and inputs.
        group: inputs that share a scale.
        groups: of a row.
        add: to each word of zeros.
        keys: the stored tensors that belong to it.
        packed_zeros: whether zeros of compressed-tensors are in words.
    """

    module: str
    kind: str
    bits: int
    shape: tuple[int, int]
    group: int
    groups: int
    keys: tuple[str, ...]
    add: int = 0
    packed_zeros: bool = False

    def slab(self, read: Read, outputs: Range, inputs: Range) -> Slab:
        """Some outputs and inputs; only the words and groups in which they lie are read."""
        order = self._stored_groups(read)
        groups = around(inputs, self.group) if order is None else Range(0, self.groups)
        numbers = {"awq": self._awq, "awq_gemv": self._rows, "gptq": self._gptq}.get(self.kind, self._rows)
        scales, zeros = self._scales(read, outputs, groups)
        return Slab(
            bits=self.bits,
            numbers=numbers(read, outputs, inputs),
            scales=scales,
            zeros=zeros,
            group_of=groups_of(inputs, self.group) if order is None else order[inputs.start : inputs.stop],
        )

    def order(self, read: Read) -> NDArray[np.int64] | None:
        """The inputs sorted by their groups, where they are not stored so (act-order); else None."""
        groups = self._stored_groups(read)
        return None if groups is None else np.argsort(groups, kind="stable")

    def _stored_groups(self, read: Read) -> NDArray[np.int64] | None:
        """The group of each input where they do not follow each other."""
        key = f"{self.module}.{'g_idx' if self.kind == 'gptq' else 'weight_g_idx'}"
        if key not in self.keys:
            return None
        groups = read(key, None, None).numpy().astype(np.int64)
        inputs = self.shape[1]
        if (groups < 0).all() or np.array_equal(groups, groups_of(Range(0, inputs), self.group)):
            return None
        if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= self.groups:
            raise _wrong(key, f"a group from 0 to {self.groups - 1} for each of {inputs} inputs",
                         f"{len(groups)} from {groups.min()} to {groups.max()}")  # fmt: skip
        return groups

    def _awq(self, read: Read, outputs: Range, inputs: Range) -> Any:
        words = read(f"{self.module}.qweight", inputs, around(outputs, 8))
        return unpacked(words, 4, awq=True)[:, within(outputs, 8)].T

    def _gptq(self, read: Read, outputs: Range, inputs: Range) -> Any:
        per = 32 // self.bits
        words = read(f"{self.module}.qweight", around(inputs, per), outputs)
        return unpacked(words.t(), self.bits)[:, within(inputs, per)]

    def _rows(self, read: Read, outputs: Range, inputs: Range) -> Any:
        if self.kind == "bytes":
            return _lifted(read(f"{self.module}.weight", outputs, inputs))
        per, name = 32 // self.bits, "qweight" if self.kind == "awq_gemv" else "weight_packed"
        return unpacked(read(f"{self.module}.{name}", outputs, around(inputs, per)), self.bits)[:, within(inputs, per)]

    def _scales(self, read: Read, outputs: Range, groups: Range) -> tuple[Any, Any]:
        """Scales and zeros [O, G]."""
        per, module = 32 // self.bits, self.module
        zeros: Any = None
        if self.kind in ("awq", "gptq"):
            words = read(f"{module}.qzeros", groups, around(outputs, per))
            zeros = unpacked(words, self.bits, awq=self.kind == "awq", add=self.add)[:, within(outputs, per)].T
            return floats(read(f"{module}.scales", groups, outputs)).T, zeros
        if self.kind == "awq_gemv":
            words = read(f"{module}.qzeros", outputs, around(groups, per))
            return floats(read(f"{module}.scales", outputs, groups)), unpacked(words, 4)[:, within(groups, per)]
        scales = floats(_by_row(read, f"{module}.weight_scale", outputs, groups))
        key = f"{module}.weight_zero_point"
        if key in self.keys and self.packed_zeros:
            words = read(key, around(outputs, per), groups).t()
            zeros = unpacked(words, self.bits)[:, within(outputs, per)].T
        elif key in self.keys:
            zeros = _lifted(_by_row(read, key, outputs, groups), 1 << (self.bits - 1))
        shape = (outputs.count, groups.count)
        return np.broadcast_to(scales, shape), None if zeros is None else np.broadcast_to(zeros, shape)


def _by_row(read: Read, key: str, outputs: Range, groups: Range) -> Tensor:
    """Scales or zeros as [O or 1, G or 1]: those of a tensor or of channels may be a number or a vector."""
    found = read(key, None, None)
    if found.numel() == 1:
        return found.reshape(1, 1)
    if found.ndim == 1:
        found = found[:, None]
    found = found[outputs.start : outputs.stop] if found.shape[0] > 1 else found
    return found[:, groups.start : groups.stop] if found.shape[1] > 1 else found


def _lifted(numbers: Tensor, by: int = 128) -> Any:
    """Signed numbers about the middle as unsigned ones."""
    return (numbers.numpy().astype(np.int16) + by).astype(np.uint8)


def awq(module: str, shapes: Shapes, method: StoredMethod) -> Integers:
    """Of `module.qweight`, `.qzeros` and `.scales`.

    Raises:
        ModelError: one is missing, or shapes do not fit together.
    """
    keys = _needed(module, shapes, ("qweight", "qzeros", "scales"))
    words, zeros, scales = (shapes[k] for k in keys)
    if method.version == "gemv":
        outputs, inputs = words[0], words[1] * 8
        groups = _groups(module, inputs, method.group, None)
        fits = zeros[0] == scales[0] == outputs and scales[1] >= groups and zeros[1] * 8 >= groups
    else:
        outputs, inputs = words[1] * 8, words[0]
        groups = _groups(module, inputs, method.group, scales[0])
        fits = zeros == (groups, words[1]) and scales == (groups, outputs)
    if not fits:
        raise _wrong(keys[0], f"qzeros and scales of {groups} groups of {inputs} inputs", f"{zeros} and {scales}")
    kind = "awq_gemv" if method.version == "gemv" else "awq"
    return Integers(module=module, kind=kind, bits=4, shape=(outputs, inputs), group=-(-inputs // groups),
                    groups=groups, keys=keys)  # fmt: skip


def gptq(module: str, shapes: Shapes, method: StoredMethod) -> Integers:
    """Of `module.qweight`, `.qzeros`, `.scales` and, if it is there, `.g_idx`; modules may have bits of their own.

    Raises:
        ModelError: one is missing, or shapes do not fit together.
    """
    keys = _needed(module, shapes, ("qweight", "qzeros", "scales"))
    words, zeros, scales = (shapes[k] for k in keys)
    outputs = words[1]
    bits = next((b for b in (4, 8) if zeros[1] * 32 == outputs * b), None)
    if bits is None or scales[1] != outputs or zeros[0] != scales[0]:
        raise _wrong(keys[1], f"zeros of 4 or 8 bits for {outputs} outputs", f"{zeros} beside scales of {scales}")
    inputs = words[0] * 32 // bits
    groups = _groups(module, inputs, method.group, scales[0])
    group = _size(inputs, method.group, groups)
    index = f"{module}.g_idx"
    return Integers(
        module=module,
        kind="gptq",
        bits=bits,
        shape=(outputs, inputs),
        group=group,
        groups=groups,
        keys=(*keys, *([index] if index in shapes else [])),
        add=_ONES[bits] if method.version == "gptq" else 0,
    )


def compressed(module: str, shapes: Shapes, types: Mapping[str, str], shape: tuple[int, int] | None) -> Integers:
    """Of `module.weight_packed`, or of an int8 `module.weight`, with `weight_scale` and what else belongs to it.

    `shape` is what `weight_shape` holds; `types` are the stored tensors' as safetensors calls them.

    Raises:
        ModelError: one is missing, or shapes do not fit together.
    """
    words = f"{module}.weight_packed" in shapes
    keys = _needed(module, shapes, ("weight_packed" if words else "weight", "weight_scale"))
    numbers, scales = shapes[keys[0]], shapes[keys[1]]
    outputs, inputs = shape or numbers[:2]
    bits = 8
    if words:
        found = [b for b in (4, 8) if numbers == (outputs, -(-inputs * b // 32))]
        if not found or shape is None:
            raise _wrong(keys[0], f"words of 4 or 8 bits for {outputs} x {inputs} weights", numbers)
        bits = found[0]
    groups = scales[1] if len(scales) == 2 else 1
    if inputs % groups or (scales and scales[0] not in (1, outputs)) or len(scales) > 2:
        raise _wrong(keys[1], f"scales of {outputs} outputs in equal groups of {inputs} inputs", scales)
    more = [f"{module}.{n}" for n in ("weight_shape", "weight_zero_point", "weight_g_idx")]
    zeros = f"{module}.weight_zero_point"
    return Integers(
        module=module,
        kind="packed" if words else "bytes",
        bits=bits,
        shape=(outputs, inputs),
        group=inputs // groups,
        groups=groups,
        keys=(*keys, *(k for k in more if k in shapes)),
        packed_zeros=words and types.get(zeros) == "I32",
    )


def _needed(module: str, shapes: Shapes, names: tuple[str, ...]) -> tuple[str, ...]:
    keys = tuple(f"{module}.{n}" for n in names)
    missing = [k for k in keys if k not in shapes]
    if missing:
        raise _wrong(module, f"a tensor {missing[0]}", "none")
    return keys


def _groups(module: str, inputs: int, group: int, stored: int | None) -> int:
    """Groups of a row: as stored, where the config's size (which modules may change) gives as many, or equal ones."""
    said = 1 if group == -1 else 0 if group == 0 else -(-inputs // group)
    if stored is None:
        if not said:
            raise _wrong(module, "group_size in quantization_config", "none")
        return said
    if stored and (said == stored or inputs % stored == 0):
        return stored
    raise _wrong(module, f"{said} groups of {group} inputs", f"{stored} for {inputs} inputs")


def _size(inputs: int, group: int, groups: int) -> int:
    return group if group > 0 and -(-inputs // group) == groups else -(-inputs // groups)


def _wrong(what: str, expected: str, actual: object) -> ModelError:
    return ModelError(f"quantised weights {what}", expected=expected, actual=actual,
                      remedy="copy the checkpoint again")  # fmt: skip
