"""Layers that keep a state instead of KV: refused by config.json alone, so that nobody waits for torch to hear it.

What it does not know is found in the built model by the same names (reading.py).
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitray.errors import unsplittable

RECURRENT = re.compile(
    "mamba|rwkv|recurrent|rglru|delta(?:net|attention)|shortconv|lstm|lightning|linearattention|retention",
    re.IGNORECASE,
)
"""Parts of the names of transformers' modules that mix positions by a state."""
_KINDS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")  # in layer_types and its like
_LISTS = ("layer_types", "layers_block_type", "block_types")
_BY_DEFAULT = (
    "falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm",
)  # fmt: skip
_ENDS = "Mixer|DeltaNet|ShortConv|Attention|MambaLayer|RecurrentBlock|LSTMLayer"
_CLASS = re.compile(rf"^ *class (\w+(?:{_ENDS}))\((?!torch)", re.MULTILINE)  # some functions of torch are classes too


def refuse_recurrent(values: Mapping[str, Any]) -> None:
    """Refuse a config whose layers, or some of them, are known to be recurrent.

    Args:
        values: what config.json holds.

    Raises:
        ModelError: names transformers' module, and the layers.
    """
    inner = values.get("text_config")
    config = inner if isinstance(inner, dict) else values
    kind = str(config.get("model_type") or values.get("model_type"))
    family = kind.removesuffix("_text")
    types = next((config[n] for n in _LISTS if isinstance(config.get(n), list) and config[n]), None)
    if types is None and family not in _BY_DEFAULT:
        return
    layers = [i for i, t in enumerate(types or ()) if t in _KINDS]
    if types is None or layers:
        where = f" (layer {', '.join(map(str, layers[:3]))}{' ...' if len(layers) > 3 else ''})" if layers else ""
        raise unsplittable(f"architecture {kind}", "attention in every layer", _module(family) + where)


def _module(family: str) -> str:
    """The recurrent module of a family, looked up in transformers' source."""
    spec = find_spec("transformers")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "models" / family / f"modeling_{family}.py"
        if path.is_file():
            found = [m.group(1) for m in _CLASS.finditer(path.read_text(encoding="utf-8"))]
            by_own_name = (n for n in found if RECURRENT.search(n[len(family.replace("_", "")) :]))
            return next(by_own_name, next((n for n in found if RECURRENT.search(n)), f"a module of {family}"))
    return f"a module of {family}"
