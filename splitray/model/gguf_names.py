"""Which tensor of a GGUF file is which parameter of transformers' model, and what llama.cpp's converter did to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from splitray.arrays import Ints
from splitray.errors import ModelError, did_you_mean

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "gpt-oss": "gpt_oss",
}
"""transformers' model_type by llama.cpp's architecture. mistral is stored as llama, which computes the same; mixtral
as a llama with experts."""
_TURNED = ("llama", "smollm3")  # rows of q and k lie in pairs, as llama.cpp's rotation wants them
_LIFTED = ("gemma2", "gemma3")  # norms are stored as 1 + w
_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?$")


@dataclass(frozen=True, slots=True)
class Names:
    """Of a file with this architecture and so many layers."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    def stored(self, name: str) -> str | None:
        """The file's name for a parameter that one tensor holds; None if llama.cpp has none for it."""
        if name.endswith(".self_attn.sinks"):
            name += ".weight"
        return _map(self.architecture, self.layers).get_name(name, try_suffixes=(".weight", ".bias"))

    def experts(self, name: str) -> list[str] | None:
        """The file's names for stacked experts: of gate and up, or of down; None where `name` is none of theirs."""
        found = _EXPERT.match(name)
        if found is None:
            return None
        parts = ("gate", "up") if found[2] == "gate_up_proj" else ("down",)
        return [f"blk.{found[1]}.ffn_{p}_exps.{'bias' if found[3] else 'weight'}" for p in parts]

    def is_row(self, name: str) -> bool:
        """Whether a matrix of one row is stored as a vector."""
        return name.endswith(".shared_expert_gate.weight")

    def is_lifted(self, name: str) -> bool:
        """Whether 1 was added to a parameter."""
        return self.architecture in _LIFTED and name.endswith("norm.weight")

    def order(self, name: str, rows: int) -> Ints | None:
        """Where in the file each row of a parameter lies; None: in its place."""
        if self.architecture not in _TURNED or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return None
        heads = self.heads if ".q_proj." in name else self.kv_heads
        if heads < 1 or rows % (2 * heads):
            return None
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


@cache
def _map(architecture: str, layers: int) -> TensorNameMap:
    return get_tensor_name_map(architecture_of(architecture), layers)


def architecture_of(name: str) -> MODEL_ARCH:
    """Gguf's architecture of a name.

    Raises:
        ModelError: it is none of those that are read here.
    """
    known = {MODEL_ARCH_NAMES[a]: a for a in MODEL_ARCH if MODEL_ARCH_NAMES.get(a) in FAMILIES}
    if name not in known:
        remedy = f"use a model of these families, or its safetensors{did_you_mean(name, known)}"
        what = "GGUF file: general.architecture"
        raise ModelError(what, expected=f"one of {sorted(known)}", actual=name, remedy=remedy)
    return known[name]
