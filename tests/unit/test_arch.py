"""Counts and sizes of a decoder, and the configs that are refused."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from splitray.arch import ModelArch, Range
from splitray.errors import InputError, ModelError, PlacementError, did_you_mean

LLAMA_7B = ModelArch(
    name="llama-7b",
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    hidden_dim=4096,
    ffn_dim=11008,
    vocab=32000,
    context_tokens=2048,
    dtype="bfloat16",
)
LLAMA_3_8B = dataclasses.replace(
    LLAMA_7B, name="llama-3-8b", num_kv_heads=8, ffn_dim=14336, vocab=128256, context_tokens=8192
)
GPT2_XL = ModelArch(
    name="gpt2-xl",
    num_layers=48,
    num_heads=25,
    num_kv_heads=25,
    head_dim=64,
    hidden_dim=1600,
    ffn_dim=6400,
    vocab=50257,
    context_tokens=1024,
    ffn_matrices=2,
    tied_embeddings=True,
)
MIXTRAL_8X7B = dataclasses.replace(
    LLAMA_7B, name="mixtral", num_kv_heads=8, ffn_dim=8, num_experts=8, expert_columns=14336
)


@pytest.mark.parametrize(
    ("arch", "published"),
    [(LLAMA_7B, 6_738e6), (LLAMA_3_8B, 8_030e6), (GPT2_XL, 1_558e6), (MIXTRAL_8X7B, 46_703e6)],
    ids=lambda value: value.name if isinstance(value, ModelArch) else "",
)
def test_weights_add_up_to_the_published_parameter_count(arch: ModelArch, published: float) -> None:
    """Norms, biases, routers and learned positions are left out: under two in a thousand."""
    assert arch.num_params == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(
    ("arch", "heads_per_group", "group_params", "ffn_unit_params", "kv_bytes"),
    [
        (LLAMA_7B, 1, 4 * 4096 * 128, 3 * 4096, 2 * 128 * 2),
        (LLAMA_3_8B, 4, (2 * 4 + 2) * 4096 * 128, 3 * 4096, 2 * 128 * 2),
        (GPT2_XL, 1, 4 * 1600 * 64, 2 * 1600, 2 * 64 * 4),
        (MIXTRAL_8X7B, 4, (2 * 4 + 2) * 4096 * 128, 3 * 4096 * 14336, 2 * 128 * 2),
    ],
    ids=lambda value: value.name if isinstance(value, ModelArch) else "",
)
def test_a_head_group_and_an_ffn_unit_have_the_weights_of_their_slices(
    arch: ModelArch, heads_per_group: int, group_params: int, ffn_unit_params: int, kv_bytes: int
) -> None:
    assert arch.heads_per_group == heads_per_group
    assert arch.group_params == group_params
    assert arch.ffn_unit_params == ffn_unit_params
    assert arch.kv_bytes_per_token == kv_bytes
    assert arch.vocab_row_params == arch.hidden_dim


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_an_element_takes_the_bytes_of_its_dtype(dtype: Any, num_bytes: int) -> None:
    assert dataclasses.replace(LLAMA_7B, dtype=dtype).dtype_bytes == num_bytes


@pytest.mark.parametrize(
    ("field", "value", "texts"),
    [
        ("num_layers", 0, ("llama-7b: num_layers", "expected at least 1", "got 0", "config.json")),
        ("ffn_dim", -3, ("llama-7b: ffn_dim", "expected at least 1", "got -3", "config.json")),
        ("vocab", 0, ("llama-7b: vocab", "got 0")),
        (
            "num_kv_heads",
            5,
            ("llama-7b: num_heads", "a multiple of num_kv_heads = 5", "got 32", "config.json"),
        ),
    ],
)
def test_a_broken_config_is_refused_with_what_to_do(field: str, value: Any, texts: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as error:
        dataclasses.replace(LLAMA_7B, **{field: value})
    for text in texts:
        assert text in str(error.value)


def test_a_range_is_half_open() -> None:
    assert Range(2, 5).count == 3
    assert Range(4, 4).count == 0


def test_an_input_error_crosses_a_process_boundary_unchanged() -> None:
    error = PlacementError("head", expected="one holder", actual=[1, 2], remedy="remove one")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is PlacementError and isinstance(again, InputError) and isinstance(again, ValueError)
    assert str(again) == str(error) == "head: expected one holder, got [1, 2]; remove one"
    assert (again.what, again.expected, again.actual, again.remedy) == (
        error.what,
        error.expected,
        error.actual,
        error.remedy,
    )


@pytest.mark.parametrize(("name", "hint"), [("atention", " (did you mean attention?)"), ("zebra", ""), (7, "")])
def test_a_near_name_is_suggested_and_a_far_one_is_not(name: object, hint: str) -> None:
    assert did_you_mean(name, ["attention", "ffn"]) == hint
