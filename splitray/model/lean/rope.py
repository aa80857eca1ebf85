"""Rotary positions of one kind of layers, as what HF's own functions do with two probing vectors.

Features turn in pairs (first, second), by halves or neighbours: x * cos + swapped(x) * sin, with the sign in sin.

Shapes: S positions, d features of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from splitray.model.lean.not_lean import NotLean
from splitray.model.qk_norm import alone
from splitray.model.split_layer import Array, SplitLayer

_KNOWN = ("default", "linear", "llama3", "yarn")  # the others change their table with the length
_TRIED = 24  # positions

Pairs = tuple[slice, slice]


def rope_options(rotary: Any, layer_type: str | None) -> dict[str, Any]:
    """What a rotary module is to be given beside the positions.

    Raises:
        NotLean: its table depends on the length.
    """
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {layer_type: rotary.rope_type}
    if any(k not in _KNOWN for k in kinds.values()):
        raise NotLean(f"rope of type {rotary.rope_type}")
    return {"layer_type": layer_type} if "layer_type" in inspect.signature(rotary.forward).parameters else {}


class Ropes:
    """Those of all layers, one for each kind."""

    def __init__(self, rotary: Any, config: PretrainedConfig, known: Ropes | None = None) -> None:
        """`rotary` is the decoder's module; kinds that another loop of the same model knows are taken from there."""
        self._rotary, self._types, self._hidden = rotary, getattr(config, "layer_types", None), config.hidden_size
        self._kinds: dict[tuple[Any, ...], Rope] = {} if known is None else dict(known._kinds)

    def of(self, layer: SplitLayer, index: int, head_dim: int) -> Rope:
        """That of one layer's attention.

        Raises:
            NotLean: see `Rope`.
        """
        kind = self._types[index] if self._types else None
        key = kind, getattr(layer.attention_module, "use_rope", None), head_dim
        if key not in self._kinds:
            rope = Rope(self._rotary, layer.attention_module, head_dim, kind)
            turns = self._rotary is not None and rope.matters(layer, self._hidden)
            self._kinds[key] = rope if turns else Rope(None, layer.attention_module, head_dim, kind)
        return self._kinds[key]

    def reach(self, positions: int, capacity: int) -> None:
        """Let every table have so many positions, and as many as the KV cache if it grows."""
        for rope in self._kinds.values():
            if positions > len(rope.cos_Sd):
                rope.grow(max(capacity, positions))


class Rope:
    """Tables that grow; features that do not turn have cos 1 and sin 0."""

    def __init__(self, rotary: Any, attention: nn.Module | None, head_dim: int, layer_type: str | None) -> None:
        """Find out which features turn, and how they are paired.

        `layer_type` is given to rotary modules that ask for it; a `rotary` of None turns nothing.

        Raises:
            NotLean: they turn in another way, or by tables that depend on the length.
        """
        self._rotary, self._d, self._options = rotary, head_dim, {}
        self.cos_Sd = self.sin_Sd = np.empty((0, head_dim), np.float32)
        self.pairs: Pairs = (slice(0, 0), slice(0, 0))
        if rotary is None:
            return
        self._options = rope_options(rotary, layer_type)
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise NotLean("no function that turns q and k")
        self._apply: Callable[..., tuple[Tensor, Tensor]] = apply
        self._turned = head_dim
        cos, _ = self._angles(_TRIED)
        for turned in (head_dim, cos.shape[-1]):
            for features in (cos.shape[-1], 2 * cos.shape[-1]):
                half = features // 2
                for pairs in ((slice(0, half), slice(half, features)), (slice(0, features, 2), slice(1, features, 2))):
                    self.pairs, self._turned = pairs, turned
                    if features <= head_dim and self._fits():
                        return
        raise NotLean(f"{apply.__module__} turns q and k in another way")

    @torch.inference_mode()
    def matters(self, layer: SplitLayer, hidden: int) -> bool:
        """Whether a layer's attention computes with the angles.

        Outputs with two kinds of angles would not tell: where one position takes all of the softmax, they are alike.
        """
        attention: Any = layer.attention_module
        x = torch.randn(1, 2, hidden, generator=torch.Generator().manual_seed(0))
        angles = self._angles(2)
        names = layer.layout.attention_arguments
        with alone(attention), _Uses(angles) as uses:
            attention(x, **{n: angles if source == "position_embeddings" else None for n, source in names})
        return uses.any

    def grow(self, positions: int) -> None:
        """Make tables for so many positions."""
        probes = torch.ones(2, 1, 1, self._d)  # one of each pair alone; the rest in both
        for own, other in zip(probes, reversed(self.pairs), strict=True):
            own[..., other] = 0
        cos_Sd, sin_Sd = torch.ones(positions, self._d), torch.zeros(positions, self._d)
        first, second = self.pairs
        if self._rotary is not None:
            for probe, own, other in zip(probes, (first, second), (second, first), strict=True):
                out = self._turn(probe.expand(1, 1, positions, self._d), positions)[0, 0]
                cos_Sd[:, own], sin_Sd[:, other] = out[:, own], out[:, other]
        self.cos_Sd, self.sin_Sd = cos_Sd.numpy(), sin_Sd.numpy()

    def _fits(self) -> bool:
        try:
            self.grow(_TRIED)
            q = torch.randn(1, 1, _TRIED, self._d, generator=torch.Generator().manual_seed(0))
            expected = self._turn(q, _TRIED)[0, 0].numpy()
        except (RuntimeError, TypeError, IndexError):
            return False
        return np.allclose(self.turned(q[0, 0].numpy()), expected, rtol=1e-4, atol=1e-5)

    def turned(self, q_Sd: Array) -> Array:
        """What the tables make of one head at the first positions, for tests of them."""
        first, second = self.pairs
        swapped = np.zeros_like(q_Sd)
        swapped[:, first], swapped[:, second] = q_Sd[:, second], q_Sd[:, first]
        y: Array = q_Sd * self.cos_Sd[: len(q_Sd)] + swapped * self.sin_Sd[: len(q_Sd)]
        return y

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        like = torch.empty(0)  # the table's dtype and device
        cos, sin = self._rotary(like, position_ids=torch.arange(positions)[None], **self._options)
        return cos, sin

    @torch.inference_mode()
    def _turn(self, q: Tensor, positions: int) -> Tensor:
        turned, rest = q[..., : self._turned], q[..., self._turned :]
        out, _ = self._apply(turned, turned, *self._angles(positions))
        return torch.cat([out, rest], dim=-1)


class _Uses(TorchFunctionMode):
    """Sees whether torch computes with some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors, self.any = tensors, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        self.any = self.any or any(a is t for a in given for t in self._tensors)
        return func(*args, **(kwargs or {}))
