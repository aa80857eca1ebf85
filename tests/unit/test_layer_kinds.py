"""The self-test sees a layer of each kind, and models whose layers differ come out exact or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import GQA, HEAD_DIM, family_config
from splits import greedy, split
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from splitray.errors import ModelError
from splitray.model import layer_kinds, lengths
from splitray.model.layer_kinds import one_of_each, with_short_lengths
from splitray.model.probe import probe_model
from splitray.model.reading import read_arch
from splitray.model.slice_reader import SliceReader
from splitray.runtime import selftest
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.selftest import self_test

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
MOE: dict[str, Any] = {**HEAD_DIM, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.5, 4.0, 6.0], "factor": 8.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


def _moe(layers: int, dense: list[int], step: int = 1) -> PretrainedConfig:
    return CONFIG_MAPPING["qwen3_moe"](
        **{**MOE, "num_hidden_layers": layers, "mlp_only_layers": dense, "decoder_sparse_step": step}
    )


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (family_config("llama"), 2),
        (_moe(48, [47]), 2),
        (_moe(48, [0, 1, 2]), 2),
        (_moe(12, [], step=4), 4),
        (CONFIG_MAPPING["gemma3_text"](**{**HEAD_DIM, "num_hidden_layers": 26}), 2),
        (CONFIG_MAPPING["smollm3"](**{**GQA, "num_hidden_layers": 8}), 2),
        (CONFIG_MAPPING["glm4_moe"](**{**GQA, "num_hidden_layers": 6}, first_k_dense_replace=2, n_routed_experts=4), 2),
    ],
)  # fmt: skip
def test_the_probe_has_a_layer_of_each_kind_and_no_more_than_it_needs(config, layers):
    small, which = one_of_each(config, 64)
    assert small.num_hidden_layers == layers
    kinds, there = layer_kinds.layer_kinds(config), layer_kinds.layer_kinds(small)
    assert kinds == [there[i] for i in which]
    assert set(layer_kinds.layer_kinds(small)) == set(layer_kinds.layer_kinds(config))


def test_windows_and_borders_are_so_short_that_the_self_test_crosses_them():
    config = CONFIG_MAPPING["phi3"](
        **GQA, sliding_window=2047, original_max_position_embeddings=64, rope_parameters=LONGROPE
    )
    short = with_short_lengths(config)
    assert short.sliding_window < selftest._PIECES[0]
    border = short.rope_parameters["original_max_position_embeddings"]
    assert sum(selftest._PIECES[:2]) < border < sum(selftest._PIECES)
    assert border == short.original_max_position_embeddings < sum(selftest._GROWING)
    assert (config.sliding_window, config.rope_parameters["original_max_position_embeddings"]) == (2047, 64)


@pytest.mark.parametrize(("dense", "columns"), [([0], 40), ([2], 40), ([0], 42), ([1], 3)])
def test_a_dense_layer_among_experts_is_exact_wherever_it_is_and_however_wide(dense, columns):
    config = _moe(3, dense)
    config.intermediate_size = columns
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    for devices in (1, 3):
        with split(model, devices=devices, seed=devices) as engine:
            assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == greedy(model, PROMPT, 8)


def test_a_wrong_sum_in_a_late_layer_alone_is_seen(monkeypatch):
    cut = SliceReader.read_cut

    def wrong(self, module, cut_, held, total, bias):
        cut(self, module, cut_, held, total, bias)
        if cut_.by == "columns" and cut_.side == "in":  # none in a layer of experts
            module.weight.data.mul_(1.05)

    monkeypatch.setattr(SliceReader, "read_cut", wrong)
    assert read_arch(_moe(48, [47]))[0].grain == "3 head groups, FFN whole"


@pytest.mark.parametrize("what", ["length_of_a_step", "read_anew"])
def test_a_rope_that_is_not_decided_as_transformers_does_is_seen(what, monkeypatch):
    monkeypatch.setattr(selftest, "_passed", {})
    config = CONFIG_MAPPING["phi3"](**GQA, original_max_position_embeddings=64, rope_parameters=LONGROPE)
    assert not self_test(config)
    monkeypatch.setattr(selftest, "_passed", {})
    if what == "read_anew":
        monkeypatch.setattr(lengths, "_READ_ANEW", ("phi3 ",))
        monkeypatch.setattr(selftest, "check_generation", lambda *_: None)
    else:
        monkeypatch.setattr(lengths.RopeLength, "begin", lambda rope, *_: setattr(rope, "length", 999))
    with pytest.raises(ModelError, match="difference of .* in the self-test"):
        self_test(config)


def test_a_model_whose_small_copy_does_not_run_is_refused_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(selftest, "_passed", {})
    probe = probe_model(family_config("llama"))

    def broken(*_: object, **__: object) -> None:
        raise AttributeError("no such cache")

    monkeypatch.setattr(probe, "forward", broken)
    monkeypatch.setattr(selftest, "probe_model", lambda _: probe)
    with pytest.raises(ModelError, match="architecture llama: .* AttributeError: no such cache"):
        self_test(family_config("llama"))


def test_a_config_without_heads_is_refused_by_name_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(selftest, "_passed", {})
    config = CONFIG_MAPPING["mamba"](vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    for reads in (read_arch, self_test):
        with pytest.raises(ModelError, match="architecture mamba"):
            reads(config)


def test_what_a_router_keeps_beside_its_weights_is_read(tmp_path):
    config = CONFIG_MAPPING["glm4_moe"](
        **GQA, head_dim=8, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn_like(buffer))
    expected = greedy(model, PROMPT, 8)
    with split(model, devices=3, seed=1) as engine:
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == expected
    model.save_pretrained(tmp_path)
    with launch_engine(model=tmp_path, devices=2, planner="even", runtime="local") as engine:
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == expected
