"""GGUF files: what their blocks mean, and models read from them slice by slice."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from splitray.errors import InputError
from splitray.model.weights.gguf_types import PLAIN, QUANTISED, floats, inputs_of, quantised, row_bytes, type_named

Kind = GGMLQuantizationType


def rows_of(kind: Kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every number, scale and minimum there is, infinite ones too."""
    size = GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, wanted, equal_nan=True)


def values_of(raw: np.ndarray, kind: Kind) -> np.ndarray:
    made = quantised(raw, kind)
    assert made is not None
    matrix, minima = made
    with np.errstate(all="ignore"):
        values = matrix.values()
        if minima is not None:
            values = values - np.repeat(minima, matrix.group, axis=1)
    return values


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
@pytest.mark.parametrize("fill", [None, 0x00, 0xFF, 0x7B, 0x80])
def test_blocks_are_the_numbers_that_gguf_makes_of_them(kind, fill):
    raw = rows_of(kind, 67, 3)
    if fill is not None:
        raw[:] = fill
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(raw, kind)
    assert same(floats(raw, kind), wanted)
    assert same(values_of(raw, kind), wanted)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_many_rows_are_unpacked_in_parts(kind, monkeypatch):
    raw = rows_of(kind, 9, 2, seed=1)
    monkeypatch.setattr("splitray.model.weights.gguf_types._AT_ONCE", 1024)
    with np.errstate(all="ignore"):
        assert same(values_of(raw, kind), quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda k: k.name)
def test_plain_floats_have_no_groups(kind):
    raw = rows_of(kind, 5, 64)
    assert floats(raw, kind).shape == (5, 64) and quantised(raw, kind) is None


def test_rows_are_whole_blocks():
    assert row_bytes(Kind.Q4_0, 64) == 36 and inputs_of(Kind.Q4_0, 36) == 64


@pytest.mark.parametrize(("number", "name"), [(int(Kind.IQ1_S), "IQ1_S"), (999, "999")])
def test_other_types_are_refused_by_name(number, name):
    with pytest.raises(InputError, match=name) as refused:
        type_named(number, file="m.gguf", tensor="output.weight")
    assert "output.weight" in refused.value.what and "m.gguf" in refused.value.what
