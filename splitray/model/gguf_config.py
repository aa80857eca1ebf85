"""transformers' config of the model in a GGUF file, from what the file says and what llama.cpp knows without it.

transformers' own reader loses what changes results: the size of heads (qwen3), capped logits and query scales (gemma),
every scaled rotation (llama 3.1, phi3, yarn, gemma3), the windows of phi3 and gpt-oss, and smollm3 as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from splitray.errors import ModelError
from splitray.model.gguf_file import GgufFile
from splitray.model.gguf_names import FAMILIES, architecture_of
from splitray.model.weights.gguf_types import floats

_SIZES = {  # transformers' names by those of the file
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers: there queries are scaled by the width of all heads together
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LIKE = 1e-4
_TOKEN_LIST = "tokenizer.ggml.tokens"
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|eot|>")


def config_of(file: GgufFile) -> PretrainedConfig:
    """The config of a file's model.

    Raises:
        ModelError: the file is of a family that is not read here, or does not say what its config needs.
    """
    architecture = file.architecture
    architecture_of(architecture)
    said = _Said(file, architecture)
    values: dict[str, Any] = {ours: said.needed(key) for key, ours in _SIZES.items()}
    values["num_key_value_heads"] = said("attention.head_count_kv", values["num_attention_heads"])
    for ours, value in values.items():
        if not isinstance(value, int | float) or value <= 0:
            raise said.refused(ours, "one number above 0 for all layers", value)
    if values["hidden_size"] % values["num_attention_heads"] and said("attention.key_length") is None:
        raise said.refused(
            "embedding_length", f"a multiple of {values['num_attention_heads']} heads", values["hidden_size"]
        )
    values["vocab_size"] = _vocabulary(file)
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    for theirs, ours in _TOKENS.items():
        values[ours] = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    values["eos_token_id"] = _ends(file, values["eos_token_id"])
    if architecture not in ("phi3", "qwen2", "qwen2moe", "smollm3"):
        values["head_dim"] = said("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
    values["rope_parameters"] = _rotation(file, said, values)
    values |= _OF_FAMILY.get(architecture, _nothing)(said, values)
    try:
        family = "mixtral" if architecture == "llama" and said("expert_count", 0) else FAMILIES[architecture]
        return CONFIG_MAPPING[family](**values)  # type: ignore[no-any-return]
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise said.refused("metadata", f"a config of {architecture}", " ".join(str(error).split())[:300]) from error


class _Said:
    """What the metadata says of this architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self.architecture = file, architecture

    def __call__(self, key: str, otherwise: Any = None) -> Any:
        return self._file.metadata.get(f"{self.architecture}.{key}", otherwise)

    def needed(self, key: str) -> Any:
        value = self(key)
        if value is None:
            raise self.refused(f"{self.architecture}.{key}", "a value", "none")
        return value

    def refused(self, what: str, expected: str, actual: object) -> ModelError:
        return ModelError(f"GGUF file {self._file.files[0]}: {what}", expected=expected, actual=actual,
                          remedy="copy the file again, or use another conversion of this model")  # fmt: skip


def _ends(file: GgufFile, end: Any) -> Any:
    """The tokens that end an answer: a chat's turn may end with another one than a text.

    Files from before the metadata said so have it among their tokens, by one of few names, as llama.cpp finds it.
    """
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is None:
        tokens = file.strings(_TOKEN_LIST).get(_TOKEN_LIST, [])
        turn = next((tokens.index(name) for name in _ENDS_OF_TURN if name in tokens), None)
    return end if turn is None or turn == end else turn if end is None else [end, turn]


def _vocabulary(file: GgufFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"GGUF file {file.files[0]}", expected="a tensor token_embd.weight",
                         actual=f"{len(file.tensors)} others", remedy="copy the file again, whole")  # fmt: skip
    return table.shape[0]


def _nothing(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    return {}


def _llama(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    if said("expert_count", 0):
        return {"num_local_experts": said("expert_count"), "num_experts_per_tok": said.needed("expert_used_count")}
    names = said._file.tensors
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}


def _gemma(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    wide = values["num_hidden_layers"] == _GEMMA_27B[said.architecture]
    scalar = values["hidden_size"] // values["num_attention_heads"] if wide else values["head_dim"]
    more = {
        "query_pre_attn_scalar": scalar,
        "sliding_window": said.needed("attention.sliding_window"),
        "final_logit_softcapping": said("final_logit_softcapping"),
        "attn_logit_softcapping": said("attn_logit_softcapping"),
    }
    if said.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": said("rope.freq_base_swa", 10_000.0)}
        more["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
        pattern = said("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            more["layer_types"] = ["sliding_attention" if s else "full_attention" for s in pattern]
        else:
            more["sliding_window_pattern"] = pattern
    return more


def _phi3(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    original = said("rope.scaling.original_context_length", values["max_position_embeddings"])
    window = said("attention.sliding_window") or None
    return {"sliding_window": window, "original_max_position_embeddings": original}


def _qwen_moe(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp knows by itself that qwen3moe makes the weights of the chosen experts add up to one."""
    found = {
        "num_experts": said.needed("expert_count"),
        "num_experts_per_tok": said.needed("expert_used_count"),
        "moe_intermediate_size": said.needed("expert_feed_forward_length"),
        "norm_topk_prob": said.architecture == "qwen3moe",
    }
    if said.architecture == "qwen2moe":
        found["shared_expert_intermediate_size"] = said.needed("expert_shared_feed_forward_length")
    return found


def _gpt_oss(said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": said.needed("expert_count"),
        "num_experts_per_tok": said.needed("expert_used_count"),
        "intermediate_size": said("expert_feed_forward_length", values["intermediate_size"]),
        "sliding_window": said.needed("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in said._file.tensors,
    }


_OF_FAMILY: dict[str, Callable[[_Said, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "gpt-oss": _gpt_oss,
}


def _rotation(file: GgufFile, said: _Said, values: dict[str, Any]) -> dict[str, Any]:
    """Transformers' rope_parameters."""
    head = said("attention.key_length") or values["hidden_size"] // values["num_attention_heads"]
    rotated = said("rope.dimension_count", head)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said("rope.freq_base", 10_000.0))}
    if rotated != head:
        found["partial_rotary_factor"] = rotated / head
    kind, factor = said("rope.scaling.type", "none"), said("rope.scaling.factor", said("rope.scale_linear", 0.0))
    original = said("rope.scaling.original_context_length", values["max_position_embeddings"])
    if "rope_freqs.weight" in file.tensors:
        return found | _llama3(_factors(file, "rope_freqs.weight"), found["rope_theta"], rotated, values)
    if "rope_factors_long.weight" in file.tensors:
        short, long = (_factors(file, f"rope_factors_{n}.weight") for n in ("short", "long"))
        scaled = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        scaled["original_max_position_embeddings"] = original
        if (attention := said("rope.scaling.attn_factor")) is not None:
            scaled["attention_factor"] = attention
        return found | scaled
    if kind == "yarn" and factor:
        more = {"beta_fast": said("rope.scaling.yarn_beta_fast", 32.0), "truncate": said.architecture != "gpt-oss"}
        more["beta_slow"] = said("rope.scaling.yarn_beta_slow", 1.0)
        return found | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | more
    if kind == "linear" and factor and factor != 1:
        return found | {"rope_type": "linear", "factor": factor}
    if kind not in ("none", "linear", "yarn"):
        raise said.refused("rope.scaling.type", "none, linear, yarn, or factors in the file", kind)
    return found


def _factors(file: GgufFile, name: str) -> list[float]:
    if (stored := file.tensors.get(name)) is None:
        raise ModelError(f"GGUF file {file.files[0]}", expected=f"a tensor {name}", actual="none",
                         remedy="copy the file again, whole")  # fmt: skip
    return [float(v) for v in floats(stored.data, stored.kind).reshape(-1)]


def _llama3(factors: list[float], theta: float, rotated: int, values: dict[str, Any]) -> dict[str, Any]:
    """The rotation of llama 3.1 and later, whose factors alone are stored: by its rule where they follow it."""
    scaled: dict[str, Any] = {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
    waves = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    low, high, original = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], 8192
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - smooth) / max(factors) + smooth)
    if len(wanted) == len(factors) and np.allclose(wanted, factors, rtol=_LIKE):
        return scaled
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
            "original_max_position_embeddings": values["max_position_embeddings"]}  # fmt: skip
