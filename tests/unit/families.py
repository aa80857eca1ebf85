"""Small random models, one for each supported architecture; every weight is random, norms and biases included."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

GQA: dict[str, object] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD_DIM: dict[str, object] = {**GQA, "head_dim": 10}
IDS: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MHA: dict[str, object] = {k: v for k, v in GQA.items() if k != "num_key_value_heads"}
GPT2: dict[str, object] = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128, **IDS}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {**GQA, "tie_word_embeddings": True},
    "mistral": {**GQA, "sliding_window": 6},
    "qwen2": {**GQA, "tie_word_embeddings": True},
    "qwen3": HEAD_DIM,
    "gemma": HEAD_DIM,
    "gemma2": {**HEAD_DIM, "sliding_window": 6, "query_pre_attn_scalar": 10},
    "gemma3_text": {
        **HEAD_DIM,
        "sliding_window": 6,
        "query_pre_attn_scalar": 10,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {**GQA, "sliding_window": 6},
    "gpt2": GPT2,
    "gpt_neox": {**MHA, "rotary_pct": 0.5},
    "gptj": {**GPT2, "rotary_dim": 4},
    "opt": {
        "vocab_size": 97,
        "hidden_size": 48,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
        **IDS,
    },
    "starcoder2": {**GQA, "sliding_window": 6, "use_bias": True},
    "granite": {
        **GQA,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "olmo": GQA,
    "olmo2": GQA,
    "stablelm": {**GQA, "use_qkv_bias": True},
    "cohere": {**GQA, "use_qk_norm": True, "logit_scale": 0.3},
    "glm": {**HEAD_DIM, "partial_rotary_factor": 0.4, "attention_bias": True},
    "smollm3": {**GQA, "no_rope_layers": [1, 0, 1]},
    "mixtral": {**GQA, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **HEAD_DIM,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
MORE: dict[str, dict[str, object]] = {
    "stablelm-parallel": {**GQA, "use_parallel_residual": True, "model_type": "stablelm"},
    "glm4": {**HEAD_DIM, "partial_rotary_factor": 0.4},
    "phi": MHA,
    "exaone4": {**HEAD_DIM, "sliding_window": 6},
    "cohere2": {**GQA, "sliding_window": 6},
    "olmo3": {**GQA, "sliding_window": 6},
    "helium": {**GQA, "head_dim": 8},
    "arcee": GQA,
    "nemotron": GQA,
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 6,
        "max_position_embeddings": 128,
        "intermediate_size": 40,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 6,
        **IDS,
    },
}
EXPERTS: dict[str, object] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXERS: dict[str, dict[str, object]] = {  # attention of other kinds, experts and wirings
    "gpt_oss": {**HEAD_DIM, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "deepseek_v3": {
        **MHA, **EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 10,
    },
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 6, **IDS},
    "gemma3n_text": {
        **HEAD_DIM, "num_hidden_layers": 4, "head_dim": 8, "intermediate_size": [40] * 4, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97, "altup_num_inputs": 3,
    },
    "llama4_text": {
        **HEAD_DIM, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
        "moe_layers": [1], "no_rope_layers": [1, 0, 1], "attention_chunk_size": 7,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "falcon": {**MHA, "multi_query": True, "parallel_attn": True},
    "minicpm3": {
        **MHA, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 10,
    },
}  # fmt: skip
MORE |= MIXERS


def family_config(name: str) -> PretrainedConfig:
    """The small config of a family."""
    values = {**FAMILIES, **MORE}[name]
    values = dict(values)
    model_type = str(values.pop("model_type", name))
    return CONFIG_MAPPING[model_type](**values)


def family_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family whose every parameter matters (norms and biases are not trivial)."""
    torch.manual_seed(seed)
    config = family_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p_name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in p_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.mul_(3.0)
    return model.eval()


def save_family(name: str, folder: Path, *, seed: int = 0, max_shard_size: str = "1GB") -> PreTrainedModel:
    """Save such a model as a real checkpoint and return it."""
    model = family_model(name, seed=seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
