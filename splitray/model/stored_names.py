"""Which stored tensor is which parameter, by transformers' own rules for a checkpoint's names. Knows no files.

A text model of its own may come from the checkpoint of a wrapper that also reads images: then its parameters are those
of the wrapper's decoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from splitray.errors import ModelError

_IN_LAYER = re.compile(r"\.\d+\.")
_ROUTER = re.compile(r"\.(gate|router)\.weight$|_bias$")  # it decides, so it stays as it is; and experts' biases


@dataclass(slots=True)
class StoredNames:
    """`keys` are stored names by the text model's, `shapes` what transformers would make of them there.

    `unused` are stored names that are no parameter of the model, `others` those of a wrapper's other parts. `made` are
    parameters that transformers makes of several stored tensors or of another form of them.
    """

    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)


@dataclass(slots=True)
class Made:
    """How transformers makes parameters of stored tensors: `keys` with the pattern that each one matched."""

    name: str
    converter: WeightConverter
    model: PreTrainedModel
    ours: Mapping[str, str]
    keys: list[tuple[str, str]] = field(default_factory=list)

    def make(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, by the text model's names.

        Raises:
            ModelError: what is stored does not fit together.
        """
        converter: Any = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.name, key, pattern, read(key))
        try:
            made: dict[str, Any] = converter.convert(self.name, model=self.model, config=self.model.config)
        except Exception as error:  # noqa: BLE001 - transformers' code: it wraps every failure in another type
            said = str(error).strip().split("\n")[-1]
            raise ModelError(f"weights of {self.name}", expected="stored tensors that make it together", actual=said,
                             remedy="copy the checkpoint again") from error  # fmt: skip
        tensors = {n: v[0] if isinstance(v, list) else v for n, v in made.items()}
        return {self.ours[n]: t for n, t in tensors.items() if n in self.ours}


def stored_names(whole: PretrainedConfig, text: PreTrainedModel, stored: Mapping[str, tuple[int, ...]]) -> StoredNames:
    """Go through a checkpoint as transformers would.

    Args:
        whole: the config as it is stored.
        text: the text model on the meta device.
        stored: the shape of every stored tensor.
    """
    model = _loaded_class(whole, text)
    ours = _to_text(model, text)
    transforms = get_model_conversion_mapping(model)
    renamings: Any = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    parameters = model.state_dict()
    found, joined = StoredNames(), dict[str, Made]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if pattern is None:
            if name not in parameters:
                found.unused.append(key)
            elif name not in ours:
                found.others.append(key)
            else:
                found.keys[ours[name]] = key
                found.shapes[ours[name]] = stored[key]
            continue
        plain = _with_prefix_of(name, apply_renamings(key, renamings), model, parameters)
        found.keys[_start_as(ours, name, plain)] = key
        made = joined.setdefault(name, Made(name, copy.deepcopy(by_pattern[pattern]), model, ours))
        made.keys.append((key, pattern))
    for made in joined.values():
        for mine, tensor in made.make(lambda key: torch.empty(stored[key], device="meta")).items():
            found.made[mine], found.shapes[mine] = made, tuple(tensor.shape)
    _tie(found, text)
    return found


def _tie(found: StoredNames, text: PreTrainedModel) -> None:
    """Where only one of two tied parameters is stored, both are read from it."""
    for target, source in text.all_tied_weights_keys.items():
        for name, other in ((target, source), (source, target)):
            if name not in found.keys and other in found.keys:
                found.keys[name], found.shapes[name] = found.keys[other], found.shapes[other]


def _loaded_class(whole: PretrainedConfig, text: PreTrainedModel) -> PreTrainedModel:
    """The model that transformers would load the checkpoint into, on the meta device."""
    if type(whole) is type(text.config):
        return text
    mapping: Any = AutoModelForCausalLM._model_mapping
    kind: Any = mapping.get(type(whole), None)
    if kind is None and type(whole) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(whole)]
    if kind is None:
        raise ModelError(f"architecture {whole.model_type}", expected="a model that transformers loads for text",
                         actual=type(whole).__name__, remedy="give the text model alone")  # fmt: skip
    if kind is type(text):
        return text
    with torch.device("meta"):
        return kind._from_config(copy.deepcopy(whole), dtype=torch.float32)  # type: ignore[no-any-return]


def _to_text(model: PreTrainedModel, text: PreTrainedModel) -> dict[str, str]:
    """The text model's name of each of its parameters, by the name in `model`."""
    parameters = text.state_dict()
    if model is text:
        return {n: n for n in parameters}
    at = {_name_of(text, text.get_decoder()): _name_of(model, model.get_decoder())}
    head, own = model.get_output_embeddings(), text.get_output_embeddings()
    if head is not None and own is not None:
        at[_name_of(text, own)] = _name_of(model, head)
    found = {}
    for name in parameters:
        start = next((s for s in at if name.startswith(f"{s}.")), None)
        found[name if start is None else at[start] + name[len(start) :]] = name
    return found


def _name_of(model: PreTrainedModel, module: object) -> str:
    return next(n for n, m in model.named_modules() if m is module)


def _with_prefix_of(name: str, plain: str, model: PreTrainedModel, parameters: Iterable[str]) -> str:
    """A name before its conversion, with the model's prefix if the converted name has got it."""
    prefix = f"{model.base_model_prefix}."
    return prefix + plain if name.startswith(prefix) and not plain.startswith(prefix) else plain


def _start_as(ours: Mapping[str, str], name: str, plain: str) -> str:
    """A name before its conversion, as the text model would call it: the converted name says how it begins there."""
    if name not in ours or name == ours[name]:
        return plain
    mine = ours[name]
    shared = next(n for n in range(len(mine) + 1) if name.endswith(mine[n:]))
    start, new = name[: len(name) - len(mine) + shared], mine[:shared]
    return new + plain[len(start) :] if plain.startswith(start) else plain


def plain_in_layers(shapes: Mapping[str, tuple[int, ...]], quantised: Container[str]) -> list[str]:
    """Names of the layers' matrices that are not among those `quantised`."""
    names = [n for n, shape in shapes.items() if len(shape) == 2 and shape[0] > 1 and n not in quantised]
    return [n for n in names if _IN_LAYER.search(n) and not _ROUTER.search(n)]
