"""A model's folder is read as transformers reads it, or refused by name before anything is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import GQA, save_family
from safetensors.torch import load_file, save_file
from splits import greedy
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitray.errors import ModelError
from splitray.model.checked import check_weights
from splitray.model.reading import read_config
from splitray.profiling.family_configs import small_config
from splitray.runtime.launch import launch_engine, model_path, read_model
from splitray.runtime.sampling import Sampling

PROMPT = [5, 6, 7, 8, 9, 11]
NEW_TOKENS = 8
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, in one file."""
    folder = tmp_path_factory.mktemp("llama")
    save_family("llama", folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own."""
    folder = tmp_path_factory.mktemp("qwen3")
    save_family("qwen3", folder)
    return folder


def copied(folder: Path, to: Path, change: Callable[[Tensors], object] | None = None, **config: object) -> Path:
    """A copy in `to` with its tensors changed in place, and its config."""
    copy = to / "model"
    shutil.copytree(folder, copy)
    if change is not None:
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file({k: v.clone() for k, v in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **config}))
    return copy


def tokens_of(folder: Path, *, devices: int = 2, planner: str = "even") -> list[int]:
    """Greedy tokens of the split model."""
    with launch_engine(model=folder, devices=devices, planner=planner, runtime="local") as engine:
        return list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)))


def whole_tokens(folder: Path) -> list[int]:
    """Those of transformers."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return greedy(loaded.eval(), PROMPT, NEW_TOKENS)


def pack(kind: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({UP: tensors[UP].to(kind)})


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (None, {"intermediate_size": 32}, r"mlp.*shape \[32, 48\].*\[40, 48\]"),
        (None, {"num_key_value_heads": 2}, r"k_proj.*shape"),
        (None, {"vocab_size": 90}, r"embed_tokens.*shape \[90, 48\].*\[97, 48\]"),
        (None, {"num_hidden_layers": 2, "layer_types": None}, r"2 layers.*model\.layers\.2\."),
        (None, {"num_hidden_layers": 4, "layer_types": None}, "the 4 layers.*3 layers"),
        (None, {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers.*1 to 10000.*1000000000"),
        (lambda t: t.pop(UP), {}, UP),
        (lambda t: t.update({UP.replace("weight", "qweight"): t.pop(UP)}), {}, "up_proj.qweight.*packed"),
        (lambda t: t.update({UP + "_scale_inv": t[UP][:1]}), {}, "up_proj.weight_scale_inv.*quantised"),
        (lambda t: t.update({UP + "x": t[UP]}), {}, UP + "x"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[UP][0]}), {}, "q_proj.bias"),
        (lambda t: t.update({UP: t[UP].flatten()}), {}, r"up_proj.*shape \[40, 48\].*\[1920\]"),
        (lambda t: t.pop(HEAD), {}, "lm_head.weight.*tie_word_embeddings"),
        (pack(torch.int8), {}, "up_proj.*I8"),
        (pack(torch.uint8), {}, "up_proj.*U8"),
        (pack(torch.float8_e4m3fn), {}, "up_proj.*F8_E4M3"),
        (None, {"quantization_config": {"quant_method": "fp8"}}, "quantised by fp8"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq.*plain"),
        (None, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        (None, {"compression_config": {"format": "int-quantized"}}, "quantised by compressed-tensors"),
        (None, {"model_type": "none_such"}, "model_type.*none_such"),
        (None, {"model_type": None}, "model_type"),
        (None, {"model_type": "mine", "auto_map": {"AutoConfig": "own.Mine"}}, "code that comes with a model"),
        (None, {"num_attention_heads": 5}, "config.json|architecture"),
        (None, {"num_attention_heads": "many"}, "config.json"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(qwen3, tmp_path, change, config, said):
    with pytest.raises(ModelError, match=said):
        check_weights(copied(qwen3, tmp_path, change, **config))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _sharded(folder: Path, *, lost: bool) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    if lost:
        shards[1].unlink()
    else:
        shards[1].write_bytes(shards[1].read_bytes()[:-100])


def _without_index(folder: Path) -> None:
    _sharded(folder, lost=True)
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_pickle, "pytorch_model.bin.*pickled"),
        (lambda f: _sharded(f, lost=True), "model-00002-of-.*safetensors"),
        (lambda f: _sharded(f, lost=False), "model-00002-of-.*complete"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"), "lfs pull"),
        (lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json.*JSON object"),
        (lambda f: (f / "config.json").write_text("{"), "config.json.*JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json.*merge"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "adapter only.*merge"),
        (lambda f: (f / "model.safetensors").rename(f / "other.safetensors"), "other.safetensors.*rename"),
        (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), "model.gguf"),
        (_without_index, "add model.*index.json"),
    ],
)  # fmt: skip
def test_files_that_are_missing_damaged_or_of_another_kind_are_refused_by_name(qwen3, tmp_path, damage, said):
    folder = copied(qwen3, tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){said}"):
        check_weights(folder)


def test_names_of_a_hub_files_and_names_in_other_bytes_are_refused_with_what_to_do(llama, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="hf download meta-llama/Llama-3.2-1B"):
        read_model("meta-llama/Llama-3.2-1B")
    with pytest.raises(ModelError, match=r"a folder.*or a \.gguf file.*another file"):
        read_model(llama / "model.safetensors")
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe9l"))
    shutil.copytree(llama, latin)
    with pytest.raises(ModelError, match="UTF-8") as refused:
        read_model(latin)
    str(refused.value).encode()
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(llama, tmp_path / "with space")
    assert read_config(model_path("~/with space")).model_type == "llama"
    assert tokens_of(Path("~/with space")) == whole_tokens(llama)


def test_a_folder_is_looked_at_without_torch(qwen3, tmp_path):
    folder = copied(qwen3, tmp_path, quantization_config={"quant_method": "hqq"})
    code = f"""
import sys
from splitray.model.folder import check_folder
try:
    check_folder({str(folder)!r})
except ValueError as error:
    print(error, "torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "got hqq" in said and said.endswith("False\n")


def test_one_file_comes_before_an_index_as_in_transformers(qwen3, tmp_path):
    save_family("qwen3", tmp_path / "other", seed=1, max_shard_size="20KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(qwen3 / name, tmp_path)
    assert tokens_of(tmp_path) == whole_tokens(tmp_path) == whole_tokens(qwen3)


@pytest.mark.parametrize("planner", ["even", "edge_only", "fixed_cut:1"])
def test_a_head_beside_a_tied_embedding_is_used_wherever_it_is_placed(llama, tmp_path, planner):
    torch.manual_seed(3)
    folder = copied(llama, tmp_path, lambda t: t.update({HEAD: torch.randn_like(t[EMBEDDING])}))
    assert not read_config(folder).tie_word_embeddings
    assert tokens_of(folder, planner=planner) == whole_tokens(folder)


@pytest.mark.parametrize("change", ["both", "head only"])
def test_tied_weights_are_found_under_either_name(llama, tmp_path, change):
    def store(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if change == "head only":
            del tensors[EMBEDDING]

    folder = copied(llama, tmp_path, store)
    assert read_config(folder).tie_word_embeddings
    assert tokens_of(folder) == whole_tokens(llama)


def test_what_the_model_does_not_use_is_named_and_does_no_harm(llama, tmp_path, caplog):
    extra = {"score.weight": torch.zeros(2, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    check_weights(copied(llama, tmp_path, lambda t: t.update(extra)))
    assert "score.weight" in caplog.text and "inv_freq" not in caplog.text


VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def wrapper(kind: str) -> Any:
    """A small model that also reads images."""
    import transformers as t

    text = {**GQA, "head_dim": 8}
    torch.manual_seed(5)
    match kind:
        case "gemma3":
            layers = ["sliding_attention", "full_attention", "sliding_attention"]
            text |= {"sliding_window": 4, "layer_types": layers}
            config: Any = t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4,
                                         image_token_index=90, boi_token_index=91, eoi_token_index=92)  # fmt: skip
            return t.Gemma3ForConditionalGeneration(config)
        case "mistral3":
            config = t.Mistral3Config(text_config={"model_type": "mistral", **text}, image_token_index=90,
                                      vision_config={"model_type": "pixtral", **VISION},
                                      tie_word_embeddings=False)  # fmt: skip
            return t.Mistral3ForConditionalGeneration(config)
        case "llava":
            config = t.LlavaConfig(text_config={"model_type": "llama", **text}, image_token_index=90,
                                   vision_config={"model_type": "clip_vision_model", **VISION})  # fmt: skip
            return t.LlavaForConditionalGeneration(config)
    if kind in ("gemma4", "llama4"):
        return t.AutoModelForImageTextToText.from_config(small_config(kind), dtype=torch.float32)
    text |= {"rope_parameters": ROPE}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 48,
    }
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    if kind.startswith("qwen3_vl"):
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
        if kind == "qwen3_vl":
            return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        return t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)
        )
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=90, video_token_id=91,
                                vision_start_token_id=92, vision_end_token_id=93)  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llava", "qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "gemma4",
                                  "llama4"])  # fmt: skip
def test_models_that_also_read_images_are_read_for_their_text(kind, tmp_path, caplog):
    model = wrapper(kind)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "visual" not in name and "vision" not in name:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    expected = greedy(model.eval(), PROMPT, NEW_TOKENS)
    assert tokens_of(tmp_path, devices=3, planner="random") == expected
    assert "images" in caplog.text


def test_experts_that_are_stored_in_another_order_of_axes_are_turned(tmp_path):
    model = wrapper("qwen3_vl_moe")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "visual" not in name:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    expected = greedy(model.eval(), PROMPT, NEW_TOKENS)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert tokens_of(tmp_path, devices=3, planner="random") == expected


@pytest.mark.parametrize(
    ("family", "config", "module"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}, "MambaMixer"),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "attention_hidden_size": 32}, "Rwkv"),
        ("lfm2", {**GQA, "layer_types": ["conv", "full_attention", "conv"]}, "Lfm2ShortConv"),
        ("qwen3_next", {**GQA, "num_experts": 0, "layer_types": ["linear_attention", "full_attention",
                                                                 "linear_attention"]}, "GatedDeltaNet"),
    ],
)  # fmt: skip
def test_layers_without_attention_are_refused_by_their_modules_name(family, config, module):
    from transformers import AutoConfig

    from splitray.model.reading import read_arch

    with pytest.raises(ModelError, match=module):
        read_arch(AutoConfig.for_model(family, **config))
