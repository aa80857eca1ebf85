"""Attention of a form that is not known: HF's own module on one row, its linears transposed, as latent attention is.

Shapes: D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from splitray.model.kv_cache import KvCache, Place
from splitray.model.lean.attention import FOREVER, window_of
from splitray.model.lean.linears import project
from splitray.model.lean.norms import norm_form, row_norm
from splitray.model.lean.not_lean import NotLean
from splitray.model.lean.rope import rope_options
from splitray.model.qk_norm import alone
from splitray.model.split_layer import Array, SplitLayer

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class OwnAttention:
    """The held heads of a layer that attends to all positions: a single token needs no mask there."""

    def __init__(self, layer: SplitLayer, index: int, hidden: int, config: PretrainedConfig, rotary: Any) -> None:
        """Try it with a first token; nothing is changed before `take_over`.

        Raises:
            NotLean: it has a window, or positions by tables that depend on the length.
        """
        module: Any = layer.attention_module
        if window_of(config, index) != FOREVER:
            raise NotLean("a window around attention of another form")
        types: Any = getattr(config, "layer_types", None)
        layer_type = types[index] if types else None
        self._module, self._rotary, self._given = module, rotary, layer.layout.attention_arguments
        self._options = {} if rotary is None else rope_options(rotary, layer_type)
        self.norm = row_norm(None if layer.attention.norm is None else norm_form(layer.attention.norm, hidden))
        first = KvCache(num_layers=1 + module.layer_idx, windows=(False,) * (1 + module.layer_idx), capacity=1)
        first.begin(0, 1)
        with torch.inference_mode(), alone(module):
            self.partial(torch.ones(hidden).numpy(), first)

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout."""
        for module in self._module.modules():
            if type(module) in (nn.Linear, Conv1D):
                project((module,))

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        """As `partial` for rows, one by one: nobody knows what a module does with several."""
        opened = {id(p.cache): (p.cache, p.cache.position, p.cache.length) for p in places}
        rows = []
        for x_D, place in zip(x_ND, places, strict=True):
            place.cache.begin(place.position, 1)
            rows.append(self.partial(x_D, place.cache))
        for cache, start, stop in opened.values():
            cache.begin(start, stop - start)
        return np.stack(rows)

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        """This device's partial sum; writes its keys and values."""
        x_BTD = torch.from_numpy(self.norm(x_D))[None, None]
        places_BT = torch.tensor([[cache.position]])
        known: dict[str, Any] = {
            "position_ids": places_BT,
            "cache_position": places_BT[0],
            **dict.fromkeys(_CACHES, cache),
        }
        if self._rotary is not None:
            known["position_embeddings"] = self._rotary(x_BTD, position_ids=places_BT, **self._options)
        out = self._module(x_BTD, **{name: known.get(source) for name, source in self._given})
        y_BTD: Tensor = out[0] if isinstance(out, tuple | list) else out
        y: Array = y_BTD.reshape(-1).numpy()
        return y
