"""What a transformers model in one process does and a split one does not: each is refused, none is left out in silence.

It knows no engine and no devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from splitray.errors import InputError
from splitray.runtime.cache_handle import CacheHandle

OUTPUTS = ("output_hidden_states", "output_attentions")
LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
# transformers' models ignore them too: where there are no labels, or in loops that pass on what generate was given
_HARMLESS = {*LOSS_OPTIONS, "cache_position", "tokenizer", "assistant_tokenizer", "assistant_model"}
_FOLDER = "use the folder that the model was read from"
_UNSPLIT = "load the model with AutoModelForCausalLM.from_pretrained for it"
_MERGE = "merge the adapter into the unsplit model, save it, and split that"

METHODS = {
    "save_pretrained": _FOLDER,
    "push_to_hub": _FOLDER,
    "state_dict": _FOLDER,
    "load_state_dict": "save the weights to a folder and split that",
    "get_memory_footprint": "see what engine.stats() says of each device",
    "get_submodule": _UNSPLIT,
    "get_input_embeddings": _UNSPLIT,
    "set_input_embeddings": _UNSPLIT,
    "get_output_embeddings": _UNSPLIT,
    "set_output_embeddings": _UNSPLIT,
    "resize_token_embeddings": "resize and save the unsplit model, and split that",
    "add_adapter": _MERGE,
    "peft_config": _MERGE,
    "load_adapter": _MERGE,
    "generate_batch": "call generate, or serve the model",
    "init_continuous_batching": "call generate, or serve the model",
    "__reduce__": "load it again where it is wanted",
}
"""Methods of transformers' models that need the weights in this process, and what to do instead."""


def refused_method(name: str, remedy: str) -> Any:
    """What raises `InputError` in place of a method that would find no weights, or of an attribute of adapters."""
    what = {"__reduce__": "copying a model", "peft_config": "an adapter (PEFT)"}.get(name, name)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise InputError(what, expected="weights in this process", actual="a model split over devices", remedy=remedy)

    return property(refuse) if name == "peft_config" else refuse


def refuse_arguments(config: PretrainedConfig, given: Mapping[str, Any], *, labelled: bool = False) -> None:
    """Refuse arguments of `forward` that no device gets to know.

    Raises:
        InputError: one of them asks for something.
    """
    from_config = (*OUTPUTS, "output_router_logits") if labelled else OUTPUTS
    asked = {**{n: getattr(config, n, None) for n in from_config}, **given}
    for name, value in asked.items():
        default = name == "is_causal"  # the only one that is on
        if value is None or value is default or name in _HARMLESS:
            continue
        if name == "token_type_ids" and name not in _parameters(config):
            continue  # some tokenizers make them for models that do not look at them
        shown = tuple(value.shape) if isinstance(value, Tensor) else value
        raise InputError(name, expected="input_ids, attention_mask, position_ids, labels and logits_to_keep only",
                         actual=shown, remedy=f"leave it out, or {_UNSPLIT}")  # fmt: skip


def _parameters(config: PretrainedConfig) -> Mapping[str, Any]:
    """The parameters that the family's own forward names."""
    return inspect.signature(AutoModelForCausalLM._model_mapping[type(config)].forward).parameters


def refuse_modes(config: GenerationConfig) -> None:
    """Refuse ways to generate that look into the model, or keep its KV in another way.

    Raises:
        InputError: one of them is asked for.
    """
    wanted = {
        "assistant_early_exit": getattr(config, "assistant_early_exit", None),
        "use_mtp": getattr(config, "use_mtp", None) or None,
        "speculation_type": getattr(config, "speculation_type", None),
        "cache_implementation": config.cache_implementation
        if config.cache_implementation in ("quantized", "paged")
        else None,
    }
    for name, value in wanted.items():
        if value is not None:
            raise InputError(name, expected="a way to generate that sees ids and logits only", actual=value,
                             remedy=f"leave it out, or {_UNSPLIT}")  # fmt: skip


def refuse_wrapped(model: object) -> None:
    """Refuse to generate for a wrapper (PEFT's) that has put its own way to prepare inputs in place of the model's.

    Raises:
        InputError: it has.
    """
    own = vars(model).get("prepare_inputs_for_generation")
    if own is not None and getattr(own, "__self__", None) is not model:
        raise InputError("prepare_inputs_for_generation", expected="the split model's own",
                         actual=f"that of {type(getattr(own, '__self__', own)).__name__}", remedy=_MERGE)  # fmt: skip


def refuse_foreign(cache: object) -> None:
    """Refuse a cache that holds keys and values itself.

    Raises:
        InputError: it is none that a split model has made.
    """
    if not isinstance(cache, CacheHandle):
        raise InputError("past_key_values", expected="what a call of this model has returned",
                         actual=type(cache).__name__,
                         remedy="leave it out: KV stays on the devices, and a cache for it comes back")  # fmt: skip


def refuse_shapes(mask: object, position_ids: Tensor | None, new: tuple[int, int], all_positions: int) -> None:
    """Refuse a mask that is not [batch, all positions], and positions that are not [batch or 1, new positions].

    Raises:
        InputError: says which.
    """
    batch, new_tokens = new
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, all_positions)):
        raise InputError("attention_mask", expected=f"[{batch} sequences, {all_positions} positions before and now]",
                         actual=list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
                         remedy=f"mask tokens of a batch only, or {_UNSPLIT}")  # fmt: skip
    if position_ids is not None and position_ids.shape not in ((batch, new_tokens), (1, new_tokens)):
        raise InputError("position_ids", expected=f"[batch {batch}, {new_tokens} new positions]",
                         actual=list(position_ids.shape), remedy="give one position for each new token")  # fmt: skip


def refuse_packed(position_ids: Tensor | None) -> None:
    """Refuse several sequences in one row, which transformers tells by positions that start anew where nothing is kept.

    Raises:
        InputError: there are some.
    """
    if position_ids is not None and bool((torch.diff(position_ids, dim=-1) != 1).any()):
        raise InputError("position_ids", expected="positions one after another", actual="several sequences in a row",
                         remedy="give each its own row, padded on the left")  # fmt: skip
