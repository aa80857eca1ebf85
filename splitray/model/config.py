"""A model's config as transformers reads it, and the part of it that is a text decoder."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers import __version__ as transformers_version

from splitray.errors import ModelError, unsplittable
from splitray.model.folder import config_values, gguf_parts
from splitray.model.gguf_config import config_of
from splitray.model.gguf_file import GgufFile

_MOST_LAYERS = 10_000  # transformers writes a list of as many
_SAME_TEXT = {  # decoders inside wrappers that are, for text alone, one with a causal language model of its own
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


def whole_config(model: str | Path) -> PretrainedConfig:
    """The config of a model's folder as it is stored, or what a GGUF file says in its place.

    Raises:
        ModelError: there is none that transformers reads without code of the model's own.
    """
    if gguf_parts(model):
        return config_of(GgufFile(model))
    values = config_values(model)
    kind, what = values.get("model_type"), f"model {model}: config.json"
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        remedy = "use another model, or a version of transformers that has this one"
        if "auto_map" in values:
            remedy = "code that comes with a model is not run here: use a model that transformers has built in"
        raise ModelError(f"{what}: model_type", expected=f"one that transformers {transformers_version} has built in",
                         actual=repr(kind), remedy=remedy)  # fmt: skip
    inner = values.get("text_config")
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        layers, least = part.get("num_hidden_layers"), 1 if part is values or part is inner else 0
        if isinstance(layers, int) and not least <= layers <= _MOST_LAYERS:
            raise ModelError(f"{what}: num_hidden_layers", expected=f"{least} to {_MOST_LAYERS}", actual=layers,
                             remedy="correct config.json")  # fmt: skip
    try:
        return AutoConfig.from_pretrained(str(Path(model).expanduser()), trust_remote_code=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError, ZeroDivisionError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(what, expected=f"a config of {kind} that transformers reads", actual=said,
                         remedy="correct config.json, or copy the model again") from error  # fmt: skip


def text_part(whole: PretrainedConfig) -> PretrainedConfig:
    """The config of the text decoder alone, tied as the whole model is.

    Raises:
        ModelError: there is no decoder with a causal language model in it.
    """
    mapping: Any = AutoModelForCausalLM._model_mapping
    try:
        config = whole.get_text_config(decoder=True)
    except ValueError as error:
        raise unsplittable(f"architecture {whole.model_type}", "one text decoder", error) from error
    if config.model_type in _SAME_TEXT:
        config = _same_text(config)
    if type(config) not in mapping:
        expected = "a decoder with a causal language model"
        raise unsplittable(f"architecture {config.model_type}", expected, type(config).__name__)
    loaded: Any = mapping.get(type(whole), None)
    if config is not whole and loaded is not mapping[type(config)]:
        config.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
    return config


def _same_text(config: PretrainedConfig) -> PretrainedConfig:
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    rope = dict(values.get("rope_parameters") or {})
    for key in ("mrope_section", "mrope_interleaved"):
        rope.pop(key, None)  # without images the three positions of a token are one
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    values["rope_parameters"] = rope
    if config.model_type == "qwen3_vl_moe_text":
        values["norm_topk_prob"] = True  # as its router does, whatever the config says
    return CONFIG_MAPPING[_SAME_TEXT[config.model_type]](**values)  # type: ignore[no-any-return]


def depth_of(config: PretrainedConfig) -> int:
    """Decoder layers, each with all that belongs to it: transformers counts the two attentions of one as two layers."""
    counted: int = config.num_hidden_layers
    own = getattr(config, "num_layers", None)
    return own if type(own) is int and 0 < own < counted and counted % own == 0 else counted


def setting(config: PretrainedConfig, name: str) -> Any:
    """A setting of a config, that of the first layer where it says another one for each; None if it has none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to answer for all layers at once
        layers: Any = config.per_layer_config
        return getattr(layers[0], name, None)
