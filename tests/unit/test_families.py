"""The sweep over transformers' families: its list, its small models, what it tells apart, and all of them."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from splitray.arch import ModelArch
from splitray.commands.cli import app
from splitray.errors import InputError
from splitray.planners.protocol import ClusterState
from splitray.profiling import families as sweeping
from splitray.profiling.families import Mixed, in_a_process, sweep, try_family
from splitray.profiling.family_configs import families, random_model, small_config
from splitray.report.families import families_page
from splitray.topology import Topology

ALL = families()


def test_the_families_are_text_decoders_and_each_counts_once():
    tried = ALL["tried"]
    assert len(tried) == len(set(tried)) > 140
    assert {"llama", "gpt2", "gemma3_text", "llama4_text", "deepseek_v3", "rwkv", "gpt_neox"} <= set(tried)
    assert not {"bert", "bart", "whisper", "musicgen", "gemma3", "gpt-sw3", "xlm-roberta"} & set(tried)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gemma3_text", {"layer_types": {"sliding_attention", "full_attention"}}),
        ("glm4_moe", {"first_k_dense_replace": {1}}),
        ("axk1", {"mlp_layer_types": {"dense", "sparse"}}),
    ],
)
def test_a_small_model_has_every_kind_of_layer(family: str, kinds: dict[str, set[object]]):
    config = small_config(family)
    for name, wanted in kinds.items():
        value = getattr(config, name)
        assert set(value if isinstance(value, list) else [value]) == wanted
    assert config.num_hidden_layers <= 6 and config.hidden_size <= 64


def test_no_weight_of_a_small_model_is_one_that_does_nothing():
    model = random_model(small_config("gpt_oss"), 0)
    plain = [n for n, p in model.named_parameters() if p.std().item() < 0.01 or not torch.isfinite(p).all()]
    assert plain == []


@pytest.mark.parametrize(("groups", "units", "parallel"), [(4, 96, False), (8, 6, False), (4, 96, True), (1, 6, False)])
def test_placements_are_mixed_where_the_grain_allows(groups: int, units: int, parallel: bool):
    arch = ModelArch(name="x", num_layers=4, num_heads=8, num_kv_heads=groups, head_dim=8, hidden_dim=64,
                     ffn_dim=units, vocab=256, context_tokens=1024, parallel_block=parallel)  # fmt: skip
    state = ClusterState(arch=arch, topology=Topology.uniform(3))
    for seed in range(3):
        heads, *others = sweeping._traits(Mixed(seed).propose(state), state)
        assert heads == (groups > 1) and all(others)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_family_that_is_supported_is_exact(family: str):
    result = in_a_process(family)
    assert result["outcome"] == "exact", result
    assert result["prompts"] == [12, 700] and result["gap"] > 1e-3 and result["grain"]


def test_a_family_that_recurs_is_refused_by_its_module_at_once_and_before_a_device_starts():
    result = try_family("rwkv")
    assert (result["outcome"], result["started"]) == ("refused", False)
    assert "RwkvSelfAttention" in result["why"] and result["after_s"] < 3


def test_other_tokens_are_wrong_and_an_end_of_the_process_is_a_crash(monkeypatch: pytest.MonkeyPatch):
    assert sweeping._compared([[1, 2, 3]], [[1, 5, 3]])["why"] == "token 2 after a prompt of 12 is another"
    assert sweeping._compared([[1, 2]], [[1, 2, 3]])["outcome"] == "wrong"
    result = in_a_process("llama", limit_s=0.01)
    assert (result["outcome"], result["why"]) == ("crashed", "no answer within 0 s")


def test_an_unknown_family_is_refused():
    with pytest.raises(InputError, match="did you mean llama"):
        sweep(["lama"])


@pytest.mark.parametrize("arguments", [["--families", "llama"], ["--out", "page.md"], ["--models", "llama-1b"]])
def test_options_of_the_families_are_refused_with_other_suites(arguments: list[str]):
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 2


def test_the_page_tells_every_family_by_its_outcome():
    exact = {"outcome": "exact", "class": "A", "prompts": [12, 700], "grain": "4 head groups, 6 experts",
             "lean": True}  # fmt: skip
    refused = {"outcome": "refused", "class": "B", "why": "expected attention, got a|b", "after_s": 0.21,
               "started": False}  # fmt: skip
    page = families_page({"transformers": "5", "families": {"a": exact, "b": refused}, "wrappers": {"w": exact},
                          "variants": {}, "left_out": {"encoders": ["bert"]},
                          "counts": {"exact": 1, "refused": 1, "wrong": 0, "crashed": 0, "untried": 0}})  # fmt: skip
    assert "| 1 | 1 | 0 | 0 | 0 | 2 |" in page and "list: encoders (1).\n" in page
    assert "| `a` | `A` | 4 head groups, 6 experts | yes | 12, 700 |" in page
    assert "| `b` | `B` | expected attention, got a\\|b | 0.2 s | not started |" in page


# One of each kind of mixer, wiring, wrapper and refusal; all 194 are tried by `splitray bench --suite families`.
OF_EACH_KIND = [
    "afmoe", "apertus", "bloom", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma3n_text", "gemma4_text", "glm4",
    "glm4_moe", "gpt_oss", "llama4_text", "longcat_flash", "minicpm3", "olmo2", "phimoe", "qwen2_moe", "mamba",
    "deepseek_v32", "gemma3", "llama4", "qwen3_vl_moe", "mpt:clip", "gemma4_text:moe", "phi3:longrope",
]  # fmt: skip


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_no_family_is_wrong_and_none_crashes(family: str):
    result = in_a_process(family)
    assert result["outcome"] in ("exact", "refused", "untried"), result
    if result["outcome"] == "refused":
        assert not result["started"], result
