"""How values of the residual travel: exactly, or rounded to fewer bits. Arithmetic in numpy; knows no wire.

A codec rounds each token by itself, so that the same row gives the same bytes in a prompt, in a batch and alone.
What it applies to (the exchange rule of ARCHITECTURE.md):

- A `partial`: every holder of a partitioned sub-block rounds its own partial once, sends the same bytes to all, and
  adds what the bytes say, its own included. The residual is never folded in: it travels exact and apart, in the lead's
  message, to whoever lacks it.
- A `state`, the whole residual at a cut: the receivers get the rounded one, and every holder of the sub-block that it
  leaves goes on with the rounded one as well, sender or not. So whoever holds the residual holds the same bits.
- Nothing else: norm sums, best rows, logits and tokens stay exact, and so does a boundary that nothing crosses.

Layouts of one token of D values, little-endian: `bf16` D x 2 bytes; `int8` a float32 scale, then D bytes; `int4` a
bfloat16 scale for each group of 32 values (the last may be shorter), then ceil(D / 2) bytes, the even value low.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from splitray.arrays import Floats32
from splitray.errors import InputError, did_you_mean

Codec = Literal["none", "bf16", "int8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
GROUP = 32  # values of int4 that share a scale

Bytes = NDArray[np.uint8]


def as_codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        InputError: there is none.
    """
    for codec in CODECS:
        if codec == name:
            return codec
    raise InputError(
        "codec", expected=f"one of {list(CODECS)}", actual=name, remedy=f"use one of them{did_you_mean(name, CODECS)}"
    )


def encoded_bytes(codec: Codec, positions: int, hidden: int, *, dtype_bytes: int = 4) -> int:
    """Payload of `positions` tokens of `hidden` values; exact values take `dtype_bytes` each."""
    match codec:
        case "none":
            return positions * hidden * dtype_bytes
        case "bf16":
            return positions * hidden * 2
        case "int8":
            return positions * (4 + hidden)
        case "int4":
            return positions * (2 * -(-hidden // GROUP) + -(-hidden // 2))


def encode(codec: Codec, x_ND: Floats32) -> Bytes:
    """Round N tokens of D values to the codec's bytes [N, bytes of a token].

    A row (for int4 a group) with a NaN or an infinity stays visibly not finite when it is decoded.
    """
    x_ND = np.ascontiguousarray(x_ND, np.float32)
    match codec:
        case "none":
            return x_ND.view(np.uint8)
        case "bf16":
            return _bf16_bits(x_ND).view(np.uint8)
        case "int8":
            scale_N1 = np.abs(x_ND).max(-1, keepdims=True) / np.float32(127)
            return np.concatenate([scale_N1.view(np.uint8), _round(x_ND, scale_N1, 127).view(np.uint8)], axis=-1)
        case "int4":
            n, hidden = x_ND.shape
            groups = -(-hidden // GROUP)
            x_NGK = np.zeros((n, groups, GROUP), np.float32)
            x_NGK.reshape(n, -1)[:, :hidden] = x_ND
            bits_NG = _bf16_bits(np.abs(x_NGK).max(-1) / np.float32(7))
            q_NGK = _round(x_NGK, _bf16_values(bits_NG)[..., None], 7)
            q_ND = (q_NGK.reshape(n, -1)[:, : hidden + hidden % 2] + 8).astype(np.uint8)
            return np.concatenate([bits_NG.view(np.uint8), q_ND[:, ::2] | q_ND[:, 1::2] << 4], axis=-1)


def decode(codec: Codec, coded_NB: Bytes, hidden: int) -> Floats32:
    """The values [N, hidden] that the bytes of `encode` say."""
    coded_NB = np.ascontiguousarray(coded_NB)
    match codec:
        case "none":
            return coded_NB.view(np.float32)
        case "bf16":
            return _bf16_values(coded_NB.view(np.uint16))
        case "int8":
            scale_N1 = np.ascontiguousarray(coded_NB[:, :4]).view(np.float32)
            return _scaled(coded_NB[:, 4:].view(np.int8), scale_N1)
        case "int4":
            n, groups = len(coded_NB), -(-hidden // GROUP)
            scale_NG = _bf16_values(np.ascontiguousarray(coded_NB[:, : 2 * groups]).view(np.uint16))
            pairs_NB = coded_NB[:, 2 * groups :]
            q_ND = np.stack([pairs_NB & 15, pairs_NB >> 4], axis=-1).reshape(n, -1)[:, :hidden]
            return _scaled(q_ND.astype(np.int8) - np.int8(8), np.repeat(scale_NG, GROUP, axis=1)[:, :hidden])


def _round(x: Floats32, scale: Floats32, most: int) -> NDArray[np.int8]:
    """Divide by the scale and round to whole numbers within +-most; 0 where the scale is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = np.where(scale > 0, x / scale, np.float32(0))
    return np.clip(np.nan_to_num(np.rint(q)), -most, most).astype(np.int8)


def _scaled(q: NDArray[np.int8], scale: Floats32) -> Floats32:
    with np.errstate(invalid="ignore"):  # 0 times an infinite scale
        values: Floats32 = q * scale
    return values


def _bf16_bits(x: Floats32) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to the nearest, ties to even; a NaN stays one."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _bf16_values(bits: NDArray[np.uint16]) -> Floats32:
    return (bits.astype(np.uint32) << 16).view(np.float32)
