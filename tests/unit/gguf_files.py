"""GGUF files of small models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, object] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, object] = {**SIZES, "head_dim": 32}
EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", SIZES),
    "mistral": ("llama", {**SIZES, "sliding_window": None}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", HEADS),
    "gemma2": ("gemma2", {**HEADS, "sliding_window": 6, "query_pre_attn_scalar": 32}),
    "gemma3_text": ("gemma3", {**HEADS, "num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 32}),
    "phi3": ("phi3", SIZES),
    "smollm3": ("smollm3", {**SIZES, "num_hidden_layers": 5}),
    "mixtral": ("llama", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2moe", {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3moe", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "gpt_oss": ("gpt-oss", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}


HALVES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
          Kind.IQ4_NL: (0,)}  # fmt: skip
"""Where in a block its float16 factors lie, of types that gguf only reads."""


def blocks(tensor: np.ndarray, kind: Kind) -> np.ndarray:
    """Random blocks [outputs, bytes] in the place of a matrix."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(tensor.size).integers(0, 256, (tensor.size // weights, size), dtype=np.uint8)
    for at, factor in zip(HALVES[kind], (2e-4, 1e-3), strict=False):
        raw[:, at : at + 2] = np.full(len(raw), factor, np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(*tensor.shape[:-1], -1)


def small_model(family: str, **sizes: object) -> PreTrainedModel:
    """A random model, its norms and biases random too; its numbers are multiples of 1/64, which every format has."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**MODELS[family][1], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 8, parameter.shape).float() / 64
    return model.eval()


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind: Kind = Kind.F32,
    split: int = 0,
    tensors: dict[str, np.ndarray] | None = None,
    more: dict[str, object] | None = None,
    left_plain: str = "none",
) -> None:
    """Write a model whose matrices, but for one, are stored in a type; `more` metadata, `tensors` beside its own."""
    config = model.config
    family = config.model_type
    name = MODELS[family][0]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split)
    _metadata(writer, name, config)
    if "tokenizer.ggml.tokens" not in (more or {}):
        writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for key, value in (more or {}).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(key, value)
    for stored, tensor in (converted(model) | (tensors or {})).items():
        matrix = tensor.ndim > 1 and "gate_inp" not in stored and stored != left_plain
        data = (blocks if kind in HALVES else gguf.quants.quantize)(tensor, kind) if matrix else tensor
        writer.add_tensor(stored, data, raw_dtype=kind if matrix else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_metadata(folder: Path) -> dict[str, object]:
    """What a byte-level tokenizer of a folder is in a file's metadata."""
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = {i: t for t, i in said["model"]["vocab"].items()} | {t["id"]: t["content"] for t in said["added_tokens"]}
    special = {t["id"] for t in said["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [by_id[i] for i in sorted(by_id)],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in sorted(by_id)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def _metadata(writer: gguf.GGUFWriter, name: str, config: object) -> None:
    values = dict(vars(config))
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    rope = values["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    if values.get("sliding_window"):
        writer.add_sliding_window(values["sliding_window"])
    if name in ("qwen3", "qwen3moe", "gemma2", "gemma3", "gpt-oss"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(values["final_logit_softcapping"])
    if values.get("num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or values["num_experts"])
        writer.add_expert_used_count(values["num_experts_per_tok"])
    if name in ("gpt-oss", "qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(values.get("moe_intermediate_size") or values["intermediate_size"])
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(values["shared_expert_intermediate_size"])
    if name == "gpt-oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_bos_token_id(values["bos_token_id"])
    writer.add_eos_token_id(values["eos_token_id"])
    if values.get("pad_token_id") is not None:
        writer.add_pad_token_id(values["pad_token_id"])


def converted(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names, as its converter stores them."""
    config = model.config
    name = MODELS[config.model_type][0]
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found: dict[str, np.ndarray] = {}
    for key, tensor in model.state_dict().items():
        data = tensor.numpy()
        if key in tied:
            continue
        if ".mlp.experts." in key:
            found |= _experts(key, data, turned=name == "gpt-oss")
            continue
        if key.endswith(".sinks"):
            key += ".weight"
        kind = next((k for k in heads if f".{k}." in key), None)
        if kind and name in ("llama", "smollm3"):
            n = heads[kind]
            data = data.reshape(n, 2, len(data) // n // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if name in ("gemma2", "gemma3") and key.endswith("norm.weight"):
            data = data + 1
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert stored is not None, key
        found[stored] = np.ascontiguousarray(data[0] if "shared_expert_gate" in key else data)
    return found


def _experts(key: str, data: np.ndarray, *, turned: bool) -> dict[str, np.ndarray]:
    """Gate and up behind each other, or in turn and with inputs before outputs."""
    layer, kind = key.split(".")[2], key.rsplit(".", 1)[1]
    end = "bias" if kind.endswith("_bias") else "weight"
    if end == "weight" and turned:
        data = data.swapaxes(1, 2)
    gate, up = (data[:, ::2], data[:, 1::2]) if turned else np.split(data, 2, axis=1)
    parts = {"gate": gate, "up": up} if kind.startswith("gate_up") else {"down": data}
    return {f"blk.{layer}.ffn_{p}_exps.{end}": np.ascontiguousarray(d) for p, d in parts.items()}
