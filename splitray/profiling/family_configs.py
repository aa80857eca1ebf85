"""Small random models of every family of text decoders in transformers, and which families those are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as known

from splitray.model import smaller as sizes
from splitray.profiling.family_variants import VARIANTS

_LAYERS, _CONTEXT = 4, 1024
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_SIZES = {
    256: "original_max_position_embeddings",
    64: "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size "
        "local_attention_window_len index_topk attention_chunk_size floor_scale",
    2: "sliding_window_pattern num_kv_shared_layers global_attn_every_n_layers attn_layer_period num_layers_per_stack "
       "n_layers_per_attn_res_block",
    1: "first_k_dense_replace num_dense_layers moe_layer_start_index attn_layer_offset",
    _CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length",
}  # fmt: skip
_LENGTHS = {name: size for size, names in _SIZES.items() for name in names.split()}
SMALL = {**sizes.SMALL, **_LENGTHS, **dict.fromkeys(_DEPTHS, _LAYERS)}
"""The most that a number of a config may be."""

_GRANITE = {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "layer_types": None}
_ROPES = {f"{k}_attention": {"rope_type": "default", "rope_theta": t} for k, t in (("full", 1e6), ("sliding", 1e4))}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": 4},
    "cohere_compass_text": {"rope_parameters": _ROPES, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "gemma3n_text": {"intermediate_size": [96] * 4},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": _GRANITE, "granite_swa": _GRANITE, "granitemoe": _GRANITE, "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE | {"shared_intermediate_size": 32},
    "granitemoehybrid": _GRANITE | {"layer_types": ["mamba", "attention"] * 2},
    "helium": {"head_dim": 8},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 6, "moe_topk": 2},
    "lfm2": {"full_attn_idxs": [1, 3], "layer_types": None, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
    "ministral": {"head_dim": 16},
    "nanochat": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen2": _WINDOWS, "qwen3": _WINDOWS, "qwen2_moe": _WINDOWS, "qwen3_moe": _WINDOWS,
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "ple_layer_ids": [1],
                       "ple_embed_dim": 32, "heads_per_ngram": 2, "split_ngram_parts": 4, "eos_token_id": 255},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "xlnet": {"d_head": 8},
    "zamba": {"attention_hidden_size": 128, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 16},
}  # fmt: skip
"""What a family needs beside small numbers, by the model type of the part that it belongs to."""

WRAPPERS = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Models for images and text whose text decoder is tried too; it counts as its own family and not as one more."""


def families() -> dict[str, list[str]]:
    """Model types with a causal language model in transformers: `tried`, and others by the reason to leave them out.

    One family a module of transformers: where a wrapper for images and its text decoder share one, it is the decoder.
    """
    found: dict[str, list[str]] = {"tried": []}
    modules: dict[str, str] = {}
    for name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = CONFIG_MAPPING[name]
        reason = _not_a_decoder(name, kind)
        before = modules.get(kind.__module__)
        if kind.model_type != name:
            reason = "second names of a family"
        if reason is None and before is not None:
            reason, less = "wrappers of a text decoder that is tried", name
            if name == f"{before}_text":
                found["tried"][found["tried"].index(before)], less = name, before
            name = less
        elif reason is None:
            modules[kind.__module__] = name
        found.setdefault(reason or "tried", []).append(name)
    return found


def _not_a_decoder(name: str, kind: type[PretrainedConfig]) -> str | None:
    options = {**{n: getattr(kind, n) for n in dir(kind) if n.startswith(("is_", "add_"))},
               **{n: p.default for n, p in inspect.signature(kind).parameters.items()}}  # fmt: skip
    parts = " ".join(kind.sub_configs)
    if options.get("is_encoder_decoder"):
        return "models with an encoder and a decoder"
    if name in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES or (
        options.get("is_decoder") is False and "add_cross_attention" in options
    ):
        return "encoders and their decoders"
    if name not in known.MODEL_MAPPING_NAMES:
        return "helpers of other models"
    return "speech" if "audio" in parts and "vision" not in parts else None


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model of this config can hold, or None where the config does not say."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, n, None) for n in _SIZES[_CONTEXT].split())
    return min((n for n in found if type(n) is int and n > 0), default=None)


def small_config(family: str) -> PretrainedConfig:
    """A config of a family, or of a variant, with small numbers, every kind of layer, and a context of 1024 tokens."""
    return _shrunk(CONFIG_MAPPING[family.split(":")[0]](), VARIANTS.get(family, {}))


def _shrunk(default: PretrainedConfig, variant: dict[str, Any] | None = None) -> PretrainedConfig:
    values: dict[str, Any] = {n: _shrunk(getattr(default, n)) for n in default.sub_configs
                              if isinstance(getattr(default, n, None), PretrainedConfig)}  # fmt: skip
    for name, value in vars(default).items():
        if type(value) is int and name in SMALL:
            values[name] = min(value, SMALL[name])
    depth = next((getattr(default, n) for n in _DEPTHS if type(getattr(default, n, None)) is int), 0)
    lists = {n: v for n, v in vars(default).items() if isinstance(v, list) and len(v) == depth > _LAYERS}
    if lists:
        values |= _some_layers(lists, depth)
        values |= dict.fromkeys(set(_DEPTHS) & set(values), len(next(v for n, v in values.items() if n in lists)))
    if "kv_lora_rank" in values:  # a latent for all heads: each has keys of its own
        values |= {"num_key_value_heads": values["num_attention_heads"], "head_dim": values["qk_rope_head_dim"]}
    values |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    values |= CHANGES.get(default.model_type, {}) | (variant or {})
    return type(default)(**values)


def _some_layers(lists: dict[str, list[Any]], depth: int) -> dict[str, list[Any]]:
    """The first layer of each kind, and more of the first ones up to four, in the order of the model."""
    told = {n: v for n, v in lists.items() if v != list(range(depth))}  # what numbers the layers tells them not apart
    kinds = [repr(kind) for kind in zip(*told.values(), strict=True)] or [""] * depth
    firsts = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    more = [i for i in range(depth) if i not in firsts][: max(0, _LAYERS - len(firsts))]
    chosen = sorted([*firsts, *more])
    return {n: [v[i] for i in chosen] if n in told else list(range(len(chosen))) for n, v in lists.items()}


def auto_class(config: PretrainedConfig) -> Any:
    """What a user loads a model of this config with."""
    parts = (type(config), type(config.get_text_config(decoder=True)))
    loads = all(part in MODEL_FOR_CAUSAL_LM_MAPPING for part in parts) or parts[0] == parts[1]
    return AutoModelForCausalLM if loads else AutoModelForImageTextToText


@torch.no_grad()
def random_model(config: PretrainedConfig, seed: int, gain: float = 1.5) -> PreTrainedModel:
    """A float32 model whose every weight matters: no zero biases, no norms of one, sums large enough to be seen.

    `gain` is by how much a linear layer makes what comes in larger.
    """
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    read: Any = model.get_input_embeddings()
    written: Any = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, tensor in _floats(model):
        if not torch.isfinite(tensor).all() or float(tensor.abs().max()) > 1e4:
            tensor.zero_()  # transformers leaves some as they were allocated
        leaf = name.rsplit(".", 1)[-1]
        if tensor.ndim < 2 or "norm" in name or leaf.startswith(("A_log", "dt_", "conv")):
            # a sink is weighed against a whole window of scores
            tensor.add_(torch.randn_like(tensor) * (0.5 if "bias" in leaf else 0.2) + 3 * ("sink" in leaf))
        elif id(tensor) in tables:
            shared = written is not None and tensor is read.weight is written.weight  # or each token would say itself
            tensor.copy_(torch.randn_like(tensor) * (0.03 if shared else 1.0))
        else:
            tensor.copy_(torch.randn_like(tensor) * (gain / max(tensor.shape[-1], 1) ** 0.5))
    return model.eval()


def _floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, and those buffers that are stored with them (corrections of routers)."""
    yield from model.named_parameters()
    stored = model.state_dict()
    yield from ((n, b) for n, b in model.named_buffers() if n in stored and "bias" in n and b.is_floating_point())
