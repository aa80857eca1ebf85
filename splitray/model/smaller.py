"""Small configs of the kind of a big one: fewer and narrower heads, experts and columns, wired alike.

What is tried on a small model (the probe, the self-test) holds for the big one, and takes a second and not a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from splitray.model.config import setting

_SIZES = {
    256: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    64: "hidden_size d_model n_embd embedding_dim attention_hidden_size word_embed_proj_dim lru_width mamba_d_ssm "
        "rel_extent chunk_size mamba_chunk_size block_size",
    96: "intermediate_size ffn_dim dff dim_ff d_inner n_inner ffn_hidden_size intermediate_size_mlp "
        "dense_intermediate_size prefix_dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank o_lora_rank state_size "
        "index_block_size ssm_state_size mamba_d_state router_hidden_size image_size",
    24: "kv_lora_rank",
    16: "head_dim d_head dim_head kv_channels swa_head_dim qk_nope_head_dim v_head_dim index_head_dim d_rel "
        "laurel_rank adapter_rank gated_norm_rank hidden_size_per_layer_input linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim time_step_rank "
        "mamba_dt_rank global_head_dim hc_lowrank patch_size",
    8: "num_attention_heads n_head n_heads num_heads attention_heads qk_rope_head_dim rotary_dim mamba_n_heads "
       "mamba_num_heads swa_num_attention_heads linear_num_heads linear_num_value_heads index_topk_blocks",
    6: "num_experts n_routed_experts num_local_experts moe_num_experts",
    4: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads index_n_heads "
       "zero_expert_num",
    2: "num_experts_per_tok moe_k moe_topk num_experts_per_token top_k_experts n_groups mamba_n_groups mamba_ngroups "
       "o_groups n_group num_expert_group moe_top_k",
    1: "topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
}  # fmt: skip
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""The most that a number of a small config is, where it counts weights and says nothing of how layers are wired."""
_SMALL_ALREADY = 256  # hidden
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


def smaller(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Configs to try in the place of one, the smallest first and itself last; perhaps not all of them make a model."""
    if config.hidden_size > _SMALL_ALREADY:
        yield _capped(config, SMALL)
        heads = {name for name in SMALL if "head" in name or name in ("hidden_size", "n_embd", "d_model")}
        yield _fewer_heads(_capped(config, {n: size for n, size in SMALL.items() if n not in heads}))
        yield _fewer_heads(config)
    yield config


def _capped(config: PretrainedConfig, most: dict[str, int]) -> PretrainedConfig:
    values, spec = copy.deepcopy(config), getattr(config, "_heterogeneity_spec", None)
    known = vars(values)
    for name, size in most.items():
        value = known.get(name)
        if type(value) is int and value > size:
            setattr(values, name, size)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            setattr(values, name, [min(v, size) for v in value])
    heads, groups = setting(config, "num_attention_heads"), setting(config, "num_key_value_heads")
    if "num_key_value_heads" in known and type(groups) is int and groups > 1 and type(heads) is int:
        fewer = min(groups, most.get("num_key_value_heads", groups))
        counted = next((n for n in _HEADS if n in known), None)
        if counted is not None and heads % groups == 0 and "num_attention_heads" in most:
            new = min(heads, most[counted]) if heads == groups else fewer * min(heads // groups, 2)
            setattr(values, counted, new)
            values.num_key_value_heads = new if heads == groups else fewer
    if "kv_lora_rank" in known and "head_dim" in known and "head_dim" in most:
        values.head_dim = values.qk_rope_head_dim  # as transformers has it
    if "qk_head_dim" in known and "qk_nope_head_dim" in known:
        values.qk_head_dim = values.qk_nope_head_dim + values.qk_rope_head_dim
    if spec is not None:  # sizes that some layers have of their own stay apart from the others'
        own: dict[int, dict[str, Any]] = {
            i: {n: min(v, 2 * most[n]) if type(v) is int and n in most else v for n, v in each.items()}
            for i, each in spec.per_layer_overrides.items()
        }
        setattr(values, "_heterogeneity_spec", replace(spec, per_layer_overrides=own))  # noqa: B010 - not declared
    return values


def _fewer_heads(config: PretrainedConfig) -> PretrainedConfig:
    """A narrower model whose heads have the size that they have."""
    values = copy.deepcopy(config)
    heads = setting(config, "num_attention_heads")
    groups = setting(config, "num_key_value_heads") or heads
    if not isinstance(groups, int) or not isinstance(heads, int) or getattr(config, "_heterogeneity_spec", None):
        return values
    fewer = min(groups, 4)
    if config.hidden_size <= _SMALL_ALREADY or groups % fewer:
        return values
    scale = groups // fewer
    values.hidden_size = config.hidden_size // scale
    values.num_attention_heads = heads // scale
    if getattr(config, "num_key_value_heads", None):
        values.num_key_value_heads = fewer
    return values
