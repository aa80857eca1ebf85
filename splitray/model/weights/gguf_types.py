"""The types of a GGUF file's tensors: blocks of bytes as float32, and as whole numbers with scales where that is exact.

Shapes: O outputs, I inputs, G groups of a row, N blocks, K numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as gguf_quants
from numpy.typing import NDArray

from splitray.arrays import Floats32
from splitray.errors import InputError
from splitray.model.weights.quantised import Bytes, Quantised, joined

Kind = GGMLQuantizationType
PLAIN = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
"""Types of plain floats, by torch's names."""
_AT_ONCE = 1 << 20  # weights that are unpacked together


@dataclass(frozen=True, slots=True)
class _Groups:
    """Blocks taken apart: value = (number - middle) * scale - minimum; scales and minima [N, groups of a block].

    `numbers` [N, bytes], of 4 bits two in a byte. Numbers from 0 upwards are moved to lie about the middle, and their
    minima with them: what a kernel rounds of the inputs is then multiplied by as little as can be.
    """

    numbers: NDArray[np.uint8]
    scales: Floats32
    bits: int
    minima: Floats32 | None = None


def type_named(number: int, *, file: object, tensor: str) -> Kind:
    """The type of this number in a file.

    Raises:
        InputError: it is none that can be read here.
    """
    known = {int(k): k for k in (*PLAIN, *_TAKEN_APART)}
    if number in known:
        return known[number]
    name = next((k.name for k in Kind if int(k) == number), f"number {number}")
    expected = f"a type among {', '.join(k.name for k in known.values())}"
    raise InputError(f"{file}: type of tensor {tensor}", expected=expected, actual=name,
                     remedy="use a file of this model in another quantisation, Q4_K_M for example")  # fmt: skip


def block_of(kind: Kind) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return GGML_QUANT_SIZES[kind]


def inputs_of(kind: Kind, num_bytes: int) -> int:
    """Inputs of a row of so many bytes."""
    weights, size = GGML_QUANT_SIZES[kind]
    return num_bytes // size * weights


def floats(raw: Bytes, kind: Kind) -> Floats32:
    """Rows of blocks [O, bytes] as float32 [O, I]: the numbers that gguf itself makes of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(gguf_quants.dequantize(np.ascontiguousarray(raw), kind), np.float32)


def quantised(raw: Bytes, kind: Kind) -> Quantised | None:
    """Rows of blocks [O, bytes] as whole numbers in MatMulNBits' layout.

    They are to the bit what `floats` gives, and within 1e-6 of a group's largest where it has a minimum.

    Returns:
        None for plain floats.
    """
    if kind in PLAIN:
        return None
    inputs = inputs_of(kind, raw.shape[1])
    step = max(1, _AT_ONCE // max(1, inputs))
    return joined([_matrix(raw[at : at + step], kind, inputs) for at in range(0, max(1, len(raw)), step)])


def _matrix(raw: Bytes, kind: Kind, inputs: int) -> Quantised:
    outputs, size = len(raw), GGML_QUANT_SIZES[kind][1]
    with np.errstate(over="ignore", invalid="ignore"):
        found = _TAKEN_APART[kind](np.ascontiguousarray(raw).reshape(-1, size))
    scales = np.ascontiguousarray(found.scales, np.float32).reshape(outputs, -1)
    groups = scales.shape[1]
    numbers = found.numbers.reshape(outputs, groups, -1)
    group = numbers.shape[2] * 8 // found.bits if outputs else 32
    minima = None if found.minima is None else np.ascontiguousarray(found.minima).reshape(outputs, -1)
    return Quantised(bits=found.bits, group=group, numbers=numbers, scales=scales, zeros=None, inputs=inputs,
                     minima=minima)  # fmt: skip


def _split(blocks: Bytes, *sizes: int) -> list[Any]:
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _half(raw: Bytes) -> Floats32:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _unpacked(raw: Bytes, bits: int, run: int) -> NDArray[np.uint8]:
    """Numbers of few bits: each run of so many bytes holds as many first numbers, then as many second ones ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (raw.reshape(len(raw), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _paired(numbers: NDArray[np.uint8]) -> Bytes:
    """Two numbers of 4 bits in a byte."""
    packed: Bytes = numbers[:, ::2] | numbers[:, 1::2] << np.uint8(4)
    return packed


def _turned(raw: Bytes, run: int) -> Bytes:
    """As `_paired` of `_unpacked` for 4 bits: bytes that hold numbers half a run apart, with neighbours in them."""
    even, odd = raw[:, ::2].reshape(len(raw), -1, run // 2), raw[:, 1::2].reshape(len(raw), -1, run // 2)
    turned = np.empty((len(raw), even.shape[1], 2, run // 2), np.uint8)
    np.bitwise_or(even & np.uint8(15), odd << np.uint8(4), out=turned[:, :, 0])
    np.bitwise_or(even >> np.uint8(4), odd & np.uint8(240), out=turned[:, :, 1])
    return turned.reshape(len(raw), -1)


def _bits(raw: Bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")


def _q4_0(blocks: Bytes) -> _Groups:
    d, qs = _split(blocks, 2)
    return _Groups(_turned(qs, 16), _half(d), 4)


def _q4_1(blocks: Bytes) -> _Groups:
    d, m, qs = _split(blocks, 2, 2)
    return _Groups(_turned(qs, 16), _half(d), 4, -_half(m) - 8 * _half(d))


def _q5_0(blocks: Bytes) -> _Groups:
    d, qh, qs = _split(blocks, 2, 4)
    return _Groups((_unpacked(qs, 4, 16) | _bits(qh) << np.uint8(4)) + np.uint8(112), _half(d), 8)


def _q5_1(blocks: Bytes) -> _Groups:
    d, m, qh, qs = _split(blocks, 2, 2, 4)
    numbers = _unpacked(qs, 4, 16) | _bits(qh) << np.uint8(4)
    return _Groups(numbers + np.uint8(112), _half(d), 8, -_half(m) - 16 * _half(d))


def _q8_0(blocks: Bytes) -> _Groups:
    d, qs = _split(blocks, 2)
    return _Groups(qs ^ np.uint8(128), _half(d), 8)


def _q2_k(blocks: Bytes) -> _Groups:
    scales, qs, d, dmin = _split(blocks, 16, 64, 2)
    minima = _half(dmin) * (scales >> 4).astype(np.float32)
    scale = _half(d) * (scales & 15).astype(np.float32)
    return _Groups(_paired(_unpacked(qs, 2, 32) + np.uint8(6)), scale, 4, minima - 2 * scale)


def _q3_k(blocks: Bytes) -> _Groups:
    high, qs, scales, d = _split(blocks, 32, 64, 12)
    six = _unpacked(scales[:, :8], 4, 8) | _unpacked(scales[:, 8:], 2, 4) << np.uint8(4)
    scale = _half(d) * (six.astype(np.float32) - 32)
    numbers = _unpacked(qs, 2, 32) + np.uint8(4) + (_unpacked(high, 1, 32) << np.uint8(2))
    return _Groups(_paired(numbers), scale, 4)


def _k_scales(d: Bytes, dmin: Bytes, packed: Bytes) -> tuple[Floats32, Floats32]:
    scales, minima = gguf_quants.Q4_K.get_scale_min(np.ascontiguousarray(packed))
    return _half(d) * scales.astype(np.float32), _half(dmin) * minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> _Groups:
    d, dmin, packed, qs = _split(blocks, 2, 2, 12)
    scales, minima = _k_scales(d, dmin, packed)
    return _Groups(_turned(qs, 32), scales, 4, minima - 8 * scales)


def _q5_k(blocks: Bytes) -> _Groups:
    d, dmin, packed, high, qs = _split(blocks, 2, 2, 12, 32)
    scales, minima = _k_scales(d, dmin, packed)
    numbers = _unpacked(qs, 4, 32) | _unpacked(high, 1, 32) << np.uint8(4)
    return _Groups(numbers + np.uint8(112), scales, 8, minima - 16 * scales)


def _q6_k(blocks: Bytes) -> _Groups:
    low, high, scales, d = _split(blocks, 128, 64, 16)
    numbers = _unpacked(low, 4, 64) | _unpacked(high, 2, 32) << np.uint8(4)
    scale = _half(d) * np.ascontiguousarray(scales).view(np.int8).astype(np.float32)
    return _Groups(numbers + np.uint8(96), scale, 8)


def _iq4_nl(blocks: Bytes) -> _Groups:
    d, qs = _split(blocks, 2)
    table = (np.array(gguf_quants.IQ4_NL.kvalues) + 128).astype(np.uint8)
    return _Groups(table[_unpacked(qs, 4, 16)], _half(d), 8)


def _mxfp4(blocks: Bytes) -> _Groups:
    e, qs = _split(blocks, 1)
    table = (np.array(gguf_quants.MXFP4.kvalues) + 128).astype(np.uint8)
    return _Groups(table[_unpacked(qs, 4, 16)], gguf_quants.MXFP4.e8m0_to_fp32_half(e), 8)


_TAKEN_APART: dict[Kind, Callable[[Bytes], _Groups]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
    Kind.IQ4_NL: _iq4_nl,
    Kind.MXFP4: _mxfp4,
}
QUANTISED = tuple(_TAKEN_APART)
"""Types whose blocks are whole numbers with scales."""
