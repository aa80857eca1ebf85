"""Other wirings that checkpoints of a family have: what their configs switch on, off or to another kind."""

from typing import Any


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


_BORDER = {"original_max_position_embeddings": 256}
_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **_BORDER)
_YARN = _rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.7, **_BORDER)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama:biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama:llama3": _LLAMA3,
    "llama:yarn": _rope("yarn", factor=4.0, **_BORDER),
    "llama:dynamic": {"max_position_embeddings": 512, **_rope("dynamic", factor=4.0, **_BORDER)},
    "mistral:full": {"sliding_window": None},
    "mixtral:window": {"sliding_window": 64},
    "starcoder2:window": {"sliding_window": 64},
    "qwen2:full": {"use_sliding_window": False, "sliding_window": None},
    "qwen2_moe:dense": {"mlp_only_layers": [0, 2]},
    "qwen3_moe:dense": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "smollm3:window": {"use_sliding_window": True, "sliding_window": 64, "layer_types": None},
    "phi3:longrope": {"original_max_position_embeddings": 256,
                      **_rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
                              factor=4.0)},
    "phi:qk": {"qk_layernorm": True},
    "stablelm:parallel": {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    "cohere:qk": {"use_qk_norm": True},
    "olmo:clip": {"clip_qkv": 1.0},
    "olmoe:clip": {"clip_qkv": 1.0},
    "granite:tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "gpt2:scaled": {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    "gpt_neox:serial": {"use_parallel_residual": False, "attention_bias": False},
    "gpt_bigcode:heads": {"multi_query": False},
    "opt:350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt:plain": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "bloom:post": {"apply_residual_connection_post_layernorm": True},
    "falcon:rw": {"alibi": True, "multi_query": False, "num_kv_heads": 8, "parallel_attn": False, "bias": True},
    "falcon:40b": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon:11b": {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    "mpt:clip": {"attn_config": {"clip_qkv": 2.0}},
    "persimmon:plain": {"qk_layernorm": False},
    "hyperclovax:plain": {"use_post_norm": False, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    "jais2:tied": {"tie_word_embeddings": True},
    "glm4_moe:qk": {"use_qk_norm": True, "attention_bias": True},
    "ernie4_5_moe:every_second": {"moe_layer_interval": 2, "moe_layer_start_index": 0, "use_bias": True},
    "deepseek_v2:groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "q_lora_rank": None},
    "deepseek_v3:plain": {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False},
    "deepseek_v3:yarn": _YARN,
    "gemma3_text:scaled": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, "final_logit_softcapping": 5.0},
    "gemma4_text:dense": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    "gemma4_text:moe": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
                        "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32},
    "llama4_text:all": {"interleave_moe_layer_step": 1, "moe_layers": None, "use_qk_norm": False,
                        "num_experts_per_tok": 2},
    "doge:moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "gpt_oss:yarn": _rope("yarn", factor=4.0, truncate=False, **_BORDER),
    "phimoe:longrope": {"original_max_position_embeddings": 256,
                        **_rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
                                short_mscale=1.1, long_mscale=1.3, **_BORDER)},
}  # fmt: skip
"""`family:name` and the values of its config."""
