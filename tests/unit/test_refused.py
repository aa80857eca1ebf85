"""Families that cannot be split: refused soon, by what is true of them, and before a device starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import family_config

from splitray.errors import ModelError
from splitray.model.checked import check_weights
from splitray.model.reading import read_arch
from splitray.model.recurrent import refuse_recurrent
from splitray.profiling.family_configs import families, random_model, small_config
from splitray.runtime import selftest

RECURRENT = {
    "mamba": "MambaMixer",
    "rwkv": "RwkvSelfAttention",
    "xlstm": "xLSTMLayer",
    "lfm2": r"Lfm2ShortConv \(layer 0, 2\)",
    "qwen3_next": r"Qwen3NextGatedDeltaNet \(layer 0, 1, 2\)",
    "kimi_linear": r"KimiLinearDeltaAttention \(layer 0, 1, 2\)",
    "recurrent_gemma": r"RecurrentGemmaRecurrentBlock \(layer 0, 1\)",
    "granitemoehybrid": r"GraniteMoeHybridMambaLayer \(layer 0, 2\)",
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_layers_are_told_by_the_config_alone(family):
    with pytest.raises(ModelError, match=f"attention in every layer, got {RECURRENT[family]}"):
        refuse_recurrent(small_config(family).to_diff_dict())


def test_defaults_count_where_a_config_does_not_say_and_wrappers_are_looked_into():
    refuse_recurrent({"model_type": "qwen3_next", "layer_types": ["full_attention"] * 2})
    refuse_recurrent({"model_type": "granitemoehybrid"})
    for values in ({"model_type": "qwen3_next"}, {"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 2}}):
        with pytest.raises(ModelError, match="GatedDeltaNet"):
            refuse_recurrent(values)


def test_no_family_of_attention_alone_is_taken_for_a_recurrent_one():
    for family in ("llama", "gpt_oss", "gemma3_text", "deepseek_v3", "gpt_neo", "lfm2"):
        config = small_config(family)
        if family == "lfm2":
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        refuse_recurrent(config.to_diff_dict())


def test_a_recurrent_model_is_refused_without_torch(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    code = f"""
import sys
from splitray.model.folder import check_folder
try:
    check_folder({str(tmp_path)!r})
except ValueError as error:
    print(error, "torch" in sys.modules, "transformers" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "MambaMixer" in said and said.endswith("False False\n")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bamba", r"layers\.0\.mamba \(BambaMixer\): get_conv_state"),
        ("zaya", r"qkv_proj \(ZayaCCAProjection\): get_conv_state"),
        ("hrm_text", "one call of each, got 12 calls"),
    ],
)
def test_what_a_layer_asks_of_its_cache_and_how_often_it_runs_is_told_without_devices(family, said):
    with pytest.raises(ModelError, match=said):
        read_arch(small_config(family))


def test_a_generation_of_its_own_is_told_before_a_probe_is_made(monkeypatch):
    monkeypatch.setattr(selftest, "_steady", lambda _: pytest.fail("a probe is made"))
    with pytest.raises(ModelError, match="default generation, got CTRLLMHeadModel.prepare_inputs_for_generation"):
        selftest.self_test(small_config("ctrl"))


def test_a_family_that_runs_asks_nothing_else_of_its_cache():
    assert read_arch(family_config("gemma3_text"))[0].num_layers == 3


def test_whole_numbers_of_a_layer_are_not_taken_for_packed_weights(tmp_path):
    random_model(small_config("deepseek_v4"), 0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gate\.tid2eid in model.safetensors: .*I64: numbers that \w*Router\w* keeps"):
        check_weights(tmp_path)


def test_layers_that_run_several_times_are_not_missed_in_the_checkpoint(tmp_path):
    random_model(small_config("hrm_text"), 0).save_pretrained(tmp_path)
    check_weights(tmp_path)


def test_the_list_of_families_holds_what_is_tried_here():
    assert set(RECURRENT) <= set(families()["tried"])
