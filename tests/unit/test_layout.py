"""The wiring read off HF's layers, and what is refused because it cannot be split exactly."""

from __future__ import annotations

import pytest
from families import IDS, family_config
from transformers import CONFIG_MAPPING

from splitray.errors import ModelError
from splitray.model.reading import read_arch
from splitray.model.slice_reader import SliceReader
from splitray.model.split_layer import LocalSubBlock
from splitray.runtime import selftest
from splitray.runtime.selftest import self_test


@pytest.mark.parametrize(
    ("family", "traits"),
    [
        ("llama", (False, False, False, 1.0)),
        ("granite", (False, False, False, 0.22)),
        ("gemma2", (False, True, False, 1.0)),
        ("olmo2", (False, True, True, 1.0)),
        ("gpt_neox", (True, False, False, 1.0)),
        ("cohere", (True, False, False, 1.0)),
        ("stablelm-parallel", (True, False, False, 1.0)),
    ],
)
def test_the_traits_that_change_what_is_exchanged_are_observed(family, traits):
    arch, layout = read_arch(family_config(family))
    scales = {wired.residual_scale for wired in layout.different}
    assert (arch.parallel_block, arch.post_norm, arch.qk_norm_over_heads, *scales) == traits


def test_roles_of_a_layers_children_are_observed():
    layout = read_arch(family_config("opt"))[1].of(0)
    assert (layout.attention_norm, layout.ffn_norm) == ("self_attn_layer_norm", "final_layer_norm")
    assert layout.ffn == ("fc1", "activation_fn", "fc2")


@pytest.mark.parametrize(
    ("family", "count"), [("mixtral", ("experts", 5)), ("llama", ("columns", 40)), ("gpt2", ("columns", 192))]
)
def test_ffn_units_are_columns_or_whole_experts(family, count):
    arch, _ = read_arch(family_config(family))
    assert ("experts" if arch.num_experts else "columns", arch.ffn_dim) == count


def test_an_attention_that_nobody_can_cut_is_one_head_group():
    config = CONFIG_MAPPING["codegen"](
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, **IDS
    )
    arch, _ = read_arch(config)
    assert (arch.num_kv_heads, arch.ffn_dim, arch.grain) == (1, 256, "attention whole, 256 columns")


def test_a_layer_that_is_wired_in_another_way_is_run_whole():
    config = CONFIG_MAPPING["opt"](
        vocab_size=97, hidden_size=48, ffn_dim=40, num_hidden_layers=2, num_attention_heads=6,
        do_layer_norm_before=False, word_embed_proj_dim=48, max_position_embeddings=64, **IDS,
    )  # fmt: skip
    arch, layout = read_arch(config)
    assert (arch.grain, layout.whole, arch.parallel_block) == ("whole layers", True, True)
    self_test(config)


def test_the_self_test_refuses_a_model_that_does_not_come_out_exact(monkeypatch):
    monkeypatch.setattr(selftest, "_passed", {})
    partial = LocalSubBlock.partial

    def wrong(self, x_BTD, arguments):
        y = partial(self, x_BTD, arguments)
        return y if y is None or arguments else y * 1.05  # FFNs get no arguments

    monkeypatch.setattr(LocalSubBlock, "partial", wrong)
    with pytest.raises(ModelError, match="difference of .* in the self-test"):
        self_test(family_config("llama"))


def test_a_projection_whose_parts_do_not_add_up_is_held_whole(monkeypatch):
    cut = SliceReader.read_cut

    def wrong(self, module, cut_, held, total, bias):
        cut(self, module, cut_, held, total, bias)
        if cut_.by == "columns" and cut_.side == "in":
            module.weight.data.mul_(1.05)

    monkeypatch.setattr(SliceReader, "read_cut", wrong)
    arch, _ = read_arch(family_config("llama"))
    assert arch.grain == "3 head groups, FFN whole"
