"""The counts of a model: what a planner is told of it, read off HF's modules on the meta device and its config."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch
from splitray.model.config import depth_of, setting
from splitray.model.layout import Layouts
from splitray.model.slicing import features, is_experts, plan_of, read_cuts
from splitray.model.surgery import layers_of

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
Dtype = Literal["float32", "bfloat16", "float16"]


def count(model: PreTrainedModel, layout: Layouts, dtype: Dtype = "float32") -> ModelArch:
    """The counts of a model on the meta device, in the finest pieces that its plan may allow."""
    config, layers = model.config, layers_of(model)
    heads = setting(config, "num_attention_heads") or 1
    head_dim = setting(config, "head_dim") or max(1, config.hidden_size // heads)
    groups = _groups(config, heads)
    ffn: dict[str, Any] = {"ffn_dim": 1, "ffn_matrices": 3} if layout.whole else _ffn_counts(layers, layout, config)
    arch = ModelArch(
        name=config.model_type,
        num_layers=depth_of(config),
        num_heads=heads,
        num_kv_heads=1 if layout.whole else groups,
        head_dim=head_dim,
        hidden_dim=config.hidden_size,
        vocab=model.get_output_embeddings().weight.shape[0],
        context_tokens=max(0, getattr(config, "max_position_embeddings", None) or 0) or 2**20,
        tied_embeddings=bool(model.all_tied_weights_keys),
        parallel_block=layout.parallel,
        post_norm=layout.has_post_norm,
        whole_layers=layout.whole,
        streams=layout.streams,
        kv_layers=_kv_layers(config),
        kv_slots=_kv_slots(config),
        dtype=dtype,
        **ffn,
    )
    if layout.whole:
        return arch
    over_heads = _norms_over_heads(getattr(layers[0], layout.of(0).attention), arch)
    return replace(arch, qk_norm_over_heads=over_heads)


def sized(arch: ModelArch, model: PreTrainedModel, layout: Layouts) -> ModelArch:
    """The counts with the true means of weights and KV where they differ from those of equal heads and columns."""
    layers = layers_of(model)
    attention, ffn, kv, rows = 0, 0, 0, 0
    for i, layer in enumerate(layers):
        if layout.whole:
            attention += _weights(layer)
            ffn += 1
        else:
            cuts = read_cuts(layer, layout.of(i), model.config, arch)
            attention += _weights(getattr(layer, layout.of(i).attention))
            by_head = [c.sections for c in cuts.values() if (c.by, c.side) == ("heads", "out")]
            rows = math.gcd(rows, *(s // arch.num_kv_heads for sections in by_head for s in sections))
            ffn += sum(_cut_weights(name, getattr(layer, name), set(cuts), arch) for name in layout.of(i).ffn)
        kv += _kv_values(layer, arch)
    known, bare = len(layers), replace(arch, attention_params=None, ffn_params=None, kv_values=None)
    head = model.get_output_embeddings()
    inside = {id(p) for x in layers for p in x.parameters()} | {id(p) for p in head.parameters()}
    inside |= {id(p) for p in model.get_input_embeddings().parameters()}
    tables = sum(p.numel() for p in model.parameters() if id(p) not in inside and p.ndim > 1)
    return replace(
        arch,
        attention_params=_unless(attention, bare.group_params * arch.num_kv_heads * known, known),
        ffn_params=_unless(ffn, bare.ffn_unit_params * arch.ffn_dim * known, known),
        head_rows=rows if rows % arch.head_dim else None,
        kv_values=_unless(kv, 2 * arch.head_dim * arch.num_kv_heads * known, known),
        embedding_params=tables if arch.tokens_everywhere else 0,
    )


def _kv_slots(config: PretrainedConfig) -> int:
    """Caches of KV that a layer has: one for each of its attentions."""
    return int(config.num_hidden_layers // depth_of(config))


def _unless(total: int, expected: int, layers: int) -> int | None:
    return None if total == expected else -(-total // layers)


def _groups(config: PretrainedConfig, heads: int) -> int:
    """So many head groups that each layer has a whole number of KV heads for each."""
    every = setting(config, "num_key_value_heads") or heads
    found = [every] if isinstance(every, int) else list(every)
    per_layer: Any = getattr(config, "per_layer_config", None)
    if per_layer is not None:
        found += [getattr(per_layer[i], "num_key_value_heads", None) or every for i in range(depth_of(config))]
    groups = math.gcd(*found)
    return groups if heads % groups == 0 else 1


def _kv_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """Of gemma3n and gemma4: the last layers read the KV of the last one of their type that has its own."""
    shared, depth = getattr(config, "num_kv_shared_layers", 0) or 0, depth_of(config)
    types = getattr(config, "layer_types", None)
    if not shared or not types:
        return ()
    own = depth - shared
    return tuple(i if i < own else max(j for j in range(own) if types[j] == types[i]) for i in range(depth))


def _ffn_counts(layers: nn.ModuleList, layout: Layouts, config: PretrainedConfig) -> dict[str, Any]:
    """Experts, or the columns of the first layer; one unit where the plan does not say what they are."""
    named = (getattr(config, name, None) for name in _EXPERT_COUNTS)
    for experts in (n for n in named if isinstance(n, int) and n > 1):
        for path, module in layers.named_modules():
            if is_experts(path, module, experts):
                each = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 2) // experts
                columns = max(1, each // (3 * config.hidden_size))
                return {"ffn_dim": experts, "num_experts": experts, "expert_columns": columns, "ffn_matrices": 3}
    modules = dict(layers[0].named_modules())
    plan = {p: s for p, (by, s) in plan_of(layers[0], layout.of(0), config).items() if by == "columns"}
    rows = [modules[p] for p, style in plan.items() if style.startswith("rowwise")]
    if len(rows) != 1:
        return {"ffn_dim": 1, "ffn_matrices": 3}
    columns = features(rows[0], "in")
    wide = sum(features(modules[p], "out") for p, style in plan.items() if not style.startswith("rowwise"))
    return {"ffn_dim": columns, "ffn_matrices": 1 + wide // columns}


def _norms_over_heads(attention: nn.Module, arch: ModelArch) -> bool:
    weight = getattr(getattr(attention, "q_norm", None), "weight", None)
    if weight is None or weight.ndim != 1:
        return False
    return int(weight.shape[0]) == arch.num_heads * arch.head_dim and arch.num_heads > 1


def _weights(module: nn.Module) -> int:
    """Of projections and tables, without norms and biases."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _cut_weights(name: str, module: nn.Module, cuts: set[str], arch: ModelArch) -> int:
    """Weights of an FFN's module that are divided among its holders: all, but a router's."""
    if arch.ffn_dim == 1:
        return _weights(module)
    return sum(
        p.numel()
        for path, m in module.named_modules(prefix=name)
        if path in cuts or is_experts(path, m, arch.num_experts)
        for p in m.parameters(recurse=False)
        if p.ndim > 1
    )


def _kv_values(layer: nn.Module, arch: ModelArch) -> int:
    """Values that a layer keeps of one token."""
    module: Any
    for module in layer.modules():
        if isinstance(getattr(module, "k_proj", None), nn.Linear):
            keys = module.k_proj.out_features
            own = getattr(module, "v_proj", None)
            return int(keys + (own.out_features if isinstance(own, nn.Linear) else keys))
        if hasattr(module, "v_head_dim") and hasattr(module, "qk_head_dim"):  # latent attention, as HF caches it
            return int(arch.num_heads * (module.qk_head_dim + module.v_head_dim))
    return 2 * arch.head_dim * arch.num_kv_heads
