"""Which layers of a model differ from each other, and a config of a model that has one of each kind and no more.

A kind is read off HF's own modules on the meta device: classes, shapes and settings, whatever the config calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from splitray.model.config import depth_of

_MOST = 12  # layers of a probe, where each one is of a kind of its own
_INDEX_NAMES = ("layer_id", "layer_index", "layer_number", "training")
FAILURES = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What transformers' code may raise for a config that it, or this engine, cannot make a model of."""
_SHORT = {  # lengths at which something changes, so small that a short prompt crosses them
    "sliding_window": 5, "sliding_window_size": 5, "window_size": 5, "local_attention": 6, "attention_chunk_size": 6,
    "keep_window_size": 5, "index_topk": 4, "index_topk_blocks": 2, "index_block_size": 3, "floor_scale": 4,
    "log_scaling_n_floor": 4, "original_max_position_embeddings": 21,
}  # fmt: skip

Kind = tuple[Any, ...]


def layer_kinds(config: PretrainedConfig) -> list[Kind]:
    """What each layer of a config's model is: equal where two layers differ in nothing but their weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    depth = depth_of(config)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return [_kind(layer) for layer in next(lists, ())]


def one_of_each(config: PretrainedConfig, vocab: int) -> tuple[PretrainedConfig, tuple[int, ...]]:
    """The config of a model with the kinds of layers of another, at least two layers, and `vocab` rows at most.

    Where no shorter config has the same kinds, that of the whole depth.

    Returns:
        The config, and for each layer of the other model which layer of this one is of its kind.
    """
    depth = depth_of(config)
    try:
        kinds = layer_kinds(config)
    except FAILURES:
        kinds = []
    firsts = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:_MOST]
    if len(firsts) < 2:
        return _shrunk(_chosen(config, [0, min(1, depth - 1)]), vocab), (0,) * depth
    wanted = {kinds[i] for i in firsts}
    for layers in (firsts, list(range(firsts[-1] + 1))):
        candidate = _chosen(config, layers)
        try:
            there = layer_kinds(candidate)
        except FAILURES:
            continue
        if wanted <= set(there):
            outlines = [_outline(k) for k in there]
            which = (there.index(k) if k in there else outlines.index(_outline(k)) for k in kinds)
            return _shrunk(candidate, vocab), tuple(which)
    return _shrunk(_chosen(config, list(range(depth))), vocab), tuple(range(depth))


def _outline(kind: Kind) -> Kind:
    """Its modules alone, for models of more kinds than a probe has layers: then they are told apart by sizes."""
    return tuple(part[:2] for part in kind)


def with_short_lengths(config: PretrainedConfig) -> PretrainedConfig:
    """The config with windows and borders that a prompt of some twenty tokens crosses."""
    values = copy.deepcopy(config)
    ropes: Any = getattr(values, "rope_parameters", None) or {}
    sets = [ropes, *(v for v in ropes.values() if isinstance(v, dict))]
    for name, most in _SHORT.items():
        for holder in (vars(values), *sets):
            if type(holder.get(name)) is int and holder[name] > most:
                holder[name] = most
    if any("dynamic" in str(s.get("rope_type")) for s in sets):
        values.max_position_embeddings = _SHORT["original_max_position_embeddings"]
    return values


def _kind(layer: nn.Module) -> Kind:
    found: list[Any] = []
    for path, module in layer.named_modules():
        shapes = tuple((n, tuple(t.shape)) for n, t in (*module._parameters.items(), *module._buffers.items())
                       if t is not None)  # fmt: skip
        settings = tuple(sorted(
            (n, repr(v)) for n, v in vars(module).items()
            if not n.startswith("_") and "idx" not in n and n not in _INDEX_NAMES
            and (v is None or isinstance(v, bool | int | float | str))
        ))  # fmt: skip
        found.append((path, type(module).__name__, shapes, settings))
    return tuple(found)


def _chosen(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of some of its layers, as far as what it says of each can be told from what it says of all."""
    values, depth = copy.deepcopy(config), depth_of(config)
    new = {old: at for at, old in reversed(list(enumerate(layers)))}
    for name, value in list(vars(values).items()):
        if name == "attention_types":
            continue
        if isinstance(value, list) and len(value) == depth:
            setattr(values, name, [value[i] for i in layers])
        elif isinstance(value, list) and "layers" in name and all(type(v) is int for v in value):
            setattr(values, name, [new[v] for v in value if v in new])  # indices, as in mlp_only_layers
        elif type(value) is int and name in ("first_k_dense_replace", "max_window_layers", "num_dense_layers"):
            setattr(values, name, sum(i < value for i in layers))
        elif type(value) is int and name == "num_kv_shared_layers":
            setattr(values, name, sum(i >= depth - value for i in layers))
    if hasattr(values, "attention_types"):  # gpt_neo
        kinds = [config.attention_layers[i] for i in layers] if len(set(config.attention_layers)) > 1 else []
        values.attention_layers = kinds or ["global", "local"]
        values.attention_types = [[values.attention_layers, 1]]
    values.num_hidden_layers = len(layers) * config.num_hidden_layers // depth
    spec: Any = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:  # sizes of their own of some layers, by their number
        known = {new[old]: own for old, own in spec.per_layer_overrides.items() if old in new}
        setattr(values, "_heterogeneity_spec", replace(spec, per_layer_overrides=known))  # noqa: B010 - not declared
    return values


def _shrunk(config: PretrainedConfig, vocab: int) -> PretrainedConfig:
    config.vocab_size = min(vocab, config.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config
