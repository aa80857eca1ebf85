"""Weights of 16 bits: nothing of them is lost, rows stay float32, and tokens are those of the same weights widened."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, family_model
from splits import split

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.weights import halves
from splitray.model.weights.halves import HalfLinear, HalfMatrix, has_kernel
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
GREEDY = Sampling(max_new_tokens=16)
HALVES = [torch.bfloat16, torch.float16]
WHOLE = {name for name in FAMILIES if "moe" in name} | {"mixtral", "gpt_oss", "dbrx"}


def weight(dtype: torch.dtype, *, scale: float = 0.02) -> torch.Tensor:
    """Ordinary numbers, a row of zeros, and some that are far smaller than the others."""
    values = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)) * scale
    values[5] = 0
    values[3, 4:9] *= 1e-11
    values[7, 1] = 3.0 * scale
    return values.to(dtype)


def close(found: np.ndarray, x: np.ndarray, given: torch.Tensor) -> bool:
    """Whether a product has float32's own rounding and no more, small outputs too."""
    wide = given.double().numpy()
    return bool((np.abs(found - x @ wide.T) <= 3e-6 * (np.abs(x) @ np.abs(wide).T) + 1e-37).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.02, 1e3, 1e25])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kernel", [True, False])
def test_a_product_is_that_of_the_same_numbers_in_float32(dtype, scale, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(halves, "has_kernel", lambda: False)
    given = weight(dtype, scale=scale if dtype == torch.bfloat16 else 0.02)
    given[3, :4] = given[3, 9:] = 0  # a row of small numbers alone
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float64)
    linear = HalfLinear(HalfMatrix(given), None)
    for rows in (x[:1], x):
        assert close(linear(rows.astype(np.float32)), rows.astype(np.float32).astype(np.float64), given)
    bias, few = torch.arange(50.0), x.astype(np.float32)
    assert np.array_equal(HalfLinear(HalfMatrix(given), bias)(few), linear(few) + bias.numpy())


def test_numbers_that_no_lift_brings_into_float16_are_widened():
    given = (10.0 ** torch.linspace(-30, 4, 200 * 70)).view(200, 70).bfloat16()
    linear = HalfLinear(HalfMatrix(given), None)
    x = np.ones((2, 70), np.float32)
    assert close(linear(x), x.astype(np.float64), given)
    assert has_kernel() is isinstance(HalfLinear(HalfMatrix(weight(torch.bfloat16)), None)._multiply, halves._Packed)
    assert not isinstance(linear._multiply, halves._Packed)


def test_rows_of_a_table():
    matrix = HalfMatrix(weight(torch.bfloat16))
    assert np.array_equal(matrix.rows([3, 3, 49]), matrix.weight[[3, 3, 49]].float().numpy())
    some = matrix.taken([Range(0, 2), Range(40, 50)])
    assert torch.equal(some.weight, torch.cat([matrix.weight[:2], matrix.weight[40:]]))
    assert matrix.num_bytes == 2 * 50 * 70


@pytest.mark.thin(8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WHOLE))
def test_tokens_are_those_of_the_same_weights_in_float32(family, dtype):
    model = copy.deepcopy(family_model(family)).to(getattr(torch, dtype)).float()
    with split(model, devices=1) as engine:
        expected = list(engine.stream(PROMPT, GREEDY))
    for devices, planner, seed in ((1, "even", 0), (2, "even", 0), (3, "random", 1), (3, "random", 2)):
        with split(model, devices=devices, planner=planner, seed=seed, weights=dtype) as engine:
            assert list(engine.stream(PROMPT, GREEDY)) == expected


def bytes_and_tokens(folder: Path, **options: Any) -> tuple[str, int, list[int]]:
    with launch_engine(model=folder, devices=2, runtime="local", **options) as engine:
        tokens = list(engine.stream(PROMPT, GREEDY))
        return engine.arch.weights, sum(s["weight_bytes"] for s in engine.stats().values()), tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_held_as_they_are_stored_but_for_small_ones(dtype, tmp_path, monkeypatch):
    copy.deepcopy(family_model("llama")).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert bytes_and_tokens(tmp_path)[0] == "float32"
    monkeypatch.setattr("splitray.arch._SMALL", 0)
    held, few, tokens = bytes_and_tokens(tmp_path)
    plain, many, expected = bytes_and_tokens(tmp_path, weights="float32")
    assert (held, plain) == (dtype, "float32") and tokens == expected
    assert few < 0.55 * many


def test_what_cannot_be_held_as_it_is_stored_is_held_in_float32(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("splitray.arch._SMALL", 0)
    copy.deepcopy(family_model("gemma3n_text")).to(torch.bfloat16).save_pretrained(tmp_path)
    held, _, _ = bytes_and_tokens(tmp_path)
    assert held == "float32" and "stored in bfloat16, held in float32" in caplog.text
    with pytest.raises(ModelError, match="nobody can cut"):
        bytes_and_tokens(tmp_path, weights="bfloat16")
