"""A checkpoint against the model that its config describes: every name, shape and type, before anything is started.

Reads the headers of its files only, and decides nothing but whether it can be run.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from splitray.errors import ModelError, unsplittable
from splitray.model.config import depth_of, text_part, whole_config
from splitray.model.folder import INDEX, ONE_FILE, check_folder, indexed
from splitray.model.opened import Opened, open_checkpoint
from splitray.model.packed_checkpoint import PackedCheckpoint
from splitray.model.reading import NOT_UNDERSTOOD, read_config, understood
from splitray.model.surgery import meta_model
from splitray.model.weights.stored.method import PLAIN

logger = logging.getLogger(__name__)
_FLOATS = ("F64", "F32", "F16", "BF16")
_IN_LAYERS = re.compile(r"^(.*?\b(?:layers|h|blocks?)\.)(\d+)\.")
_COMPUTED = re.compile(r"inv_freq$|position_ids$|\bmasked_bias$|\battn\.bias$|\battention\.bias$")
_PACKED = re.compile(
    r"\.(?:qweight|qzeros|scales|absmax|quant_map|SCB|weight_(?:packed|scale\w*|zero_point)|w\w*_scale\w*)$"
    r"|_(?:blocks|scales|scale_inv)$"
)
_MOST_TRIED = 200  # layers that are built without memory in about a second
_REMEDY = "use the config.json that belongs to these weights, or copy the model again"


def check_weights(model: str | Path) -> None:
    """Refuse a checkpoint that transformers would not read into the model of its config, or read otherwise than here.

    Raises:
        ModelError: says which tensor in which file, what the config asks for and what is there.
    """
    check_folder(model)
    checkpoint, whole = open_checkpoint(model), whole_config(model)
    _refuse_too_many_layers(checkpoint, text_part(whole))
    config = read_config(model)
    text = _built(model, config)
    with understood(config):
        names = checkpoint.names
    where = f"weights in {checkpoint.folder}"
    _refuse_numbers(checkpoint, text, names.keys)
    _refuse_types(checkpoint, list(names.keys.values()), names.unused)
    other = [n for n in names.made if len(checkpoint.shapes.get(n, (0, 0, 0))) < 3]
    if other:
        raise ModelError(where, expected="matrices that are used as they are stored", actual=_some(other),
                         remedy="use a version of the model whose tensors have transformers' own form")  # fmt: skip
    _refuse_missing(checkpoint.folder, text, names.shapes)
    for name, parameter in text.state_dict().items():
        found = names.shapes.get(name)
        if found is not None and found != tuple(parameter.shape):
            key = names.keys.get(name)
            what = f"{name} in {checkpoint.file_of(key) if key else checkpoint.folder}"
            raise ModelError(what, expected=f"shape {list(parameter.shape)} by config.json", actual=list(found),
                             remedy=_REMEDY)  # fmt: skip
    if (checkpoint.folder / ONE_FILE).is_file() and (checkpoint.folder / INDEX).is_file():
        logger.warning("%s: %s is read, as transformers does, and not what %s names", where, ONE_FILE, INDEX)
    _refuse_unused(where, text, names.unused, list(names.keys.values()))
    if type(whole) is not type(config):
        logger.warning("%s: read for its text alone: images, sound and their %d tensors are not read", model,
                       len(names.others))  # fmt: skip


def _refuse_too_many_layers(checkpoint: Opened, config: PretrainedConfig) -> None:
    """Before a model of that many layers is built, even without memory; some run the stored ones several times."""
    stored = _depth(checkpoint.shapes)
    with understood(config):
        layers = depth_of(config)
    if stored < layers <= _MOST_TRIED:
        layers = max(stored, _depth(_built(checkpoint.folder, config).state_dict()))
    if 0 < stored < layers:
        raise ModelError(f"weights in {checkpoint.folder}", expected=f"the {layers} layers of config.json",
                         actual=f"{stored} layers", remedy=_REMEDY)  # fmt: skip


def _built(model: str | Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, without memory.

    Raises:
        ModelError: transformers makes none of it: sizes, kinds or names in it are wrong.
    """
    with understood(config):
        try:
            return meta_model(config, torch.float32)
        except ImportError:
            raise  # says nothing about the config
        except NOT_UNDERSTOOD as error:
            expected = f"a config of which transformers makes a model of {config.model_type}"
            actual = f"{type(error).__name__}: {error}"
            raise ModelError(f"model {model}: config.json", expected=expected, actual=actual,
                             remedy="correct config.json, or copy the model again") from error  # fmt: skip


def _depth(names: Iterable[str]) -> int:
    return max((int(m.group(2)) + 1 for n in names if (m := _IN_LAYERS.match(n))), default=0)


def _refuse_numbers(checkpoint: Opened, text: PreTrainedModel, keys: Mapping[str, str]) -> None:
    """Refuse what a layer keeps of whole numbers: only weights are cut and sent."""
    for path, module in text.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name in keys and not buffer.is_floating_point():
                what, kind = f"{keys[name]} in {checkpoint.file_of(keys[name])}", checkpoint.type_of(keys[name])
                raise unsplittable(
                    what, "weights, which are floats", f"{kind}: numbers that {type(module).__name__} keeps"
                )


def _unpacked(checkpoint: Opened) -> str:
    """What to do with packed weights: older tools say in a file of their own how they are packed."""
    folder = Path(checkpoint.folder)
    own = next((n for n in ("quantize_config.json", "quant_config.json") if (folder / n).is_file()), None)
    if own is None or isinstance(checkpoint, PackedCheckpoint):
        return PLAIN
    return f"add what {own} says to config.json as its quantization_config, with quant_method gptq or awq, or {PLAIN}"


def _refuse_types(checkpoint: Opened, keys: Sequence[str], unused: Sequence[str]) -> None:
    packed = next((k for k in unused if _PACKED.search(k)), None)
    for key in keys if packed is None else [packed]:
        kind = checkpoint.type_of(key)
        if key == packed or kind not in _FLOATS:
            raise ModelError(f"{key} in {checkpoint.file_of(key)}", expected=f"plain floats ({', '.join(_FLOATS)})",
                             actual=f"{kind}: quantised or packed weights", remedy=_unpacked(checkpoint))  # fmt: skip


def _refuse_missing(folder: Path, text: PreTrainedModel, shapes: Mapping[str, object]) -> None:
    ignored = [re.compile(p) for p in text._keys_to_ignore_on_load_missing or ()]
    needed = (n for n, _ in text.named_parameters(remove_duplicate=False))
    missing = [n for n in needed if n not in shapes and not any(p.search(n) for p in ignored)]
    if missing:
        head = text.get_output_embeddings()
        heads = {f"{n}.weight" for n, m in text.named_modules() if m is head}
        remedy = _REMEDY
        if set(missing) <= heads:
            remedy = "the config says that the head is not tied to the embedding: correct tie_word_embeddings in "
            remedy += "config.json if it is, or add the head"
        promised = indexed(folder) if (folder / INDEX).is_file() and not (folder / ONE_FILE).is_file() else {}
        files = sorted({promised[n] for n in missing if n in promised})
        what = f"weights {_some(files)} in {folder}" if files else f"weights in {folder}"
        raise ModelError(what, expected=f"a tensor {_some(missing)}", actual=f"{len(shapes)} others", remedy=remedy)


def _refuse_unused(where: str, text: PreTrainedModel, unused: Sequence[str], used: Sequence[str]) -> None:
    """Tensors in the decoder's own layers that its config has no place for are another model's; others are named."""
    ignored = [re.compile(p) for p in text._keys_to_ignore_on_load_unexpected or ()]
    left = [k for k in unused if not _COMPUTED.search(k) and not any(p.search(k) for p in ignored)]
    lists = {m.group(1) for k in used if (m := _IN_LAYERS.match(k))}
    ours = [k for k in left if (m := _IN_LAYERS.match(k)) and m.group(1) in lists]
    if ours:
        expected = f"no more than the {depth_of(text.config)} layers of config.json have"
        raise ModelError(where, expected=expected, actual=f"also {_some(ours)}", remedy=_REMEDY)
    if left:
        logger.warning("%s: not used by this model: %s", where, _some(left))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
