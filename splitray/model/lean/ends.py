"""What a family does to the rows of the embedding and to the logits, seen by running HF's model without its layers.

Shapes: B sequences of T = 2 tokens, S positions, D hidden, V vocabulary rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitray.arch import ModelArch
from splitray.model.lean.linears import array
from splitray.model.lean.not_lean import NotLean
from splitray.model.split_layer import Array, SplitLayer
from splitray.model.weights.held import held


class Ends:
    """`scale` of the embedding's rows, `places_SD` that are added to them, and what `shape`s the logits, in place."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[SplitLayer],
        arch: ModelArch,
        *,
        embedding: Any,
        norm: nn.Module | None,
        head: Any,
    ) -> None:
        """Run what is held of both; an end that is not held is None.

        Raises:
            NotLean: more is done than the loop can do.
        """
        self.scale, self.places_SD = np.float32(1), None
        self.shape: Callable[[Array], None] = _as_is
        if embedding is None and head is None:
            return
        rows_BTD = torch.randn(2, 2, arch.hidden_dim, generator=torch.Generator().manual_seed(0))
        inputs: dict[str, Any] = {"inputs_embeds": torch.zeros_like(rows_BTD)}
        if embedding is not None:
            last = embedding.num_embeddings - 1
            inputs = {"input_ids": torch.tensor([[last // 2, last], [last, last // 2]])}
        with torch.inference_mode(), _without(layers, rows_BTD) as entered:
            logits = model(**inputs, use_cache=False).logits
        if embedding is not None:
            ids_BT = inputs["input_ids"]
            table = held(embedding)
            found_BTD, bare_BTD = entered[0], table.rows(ids_BT) if table else embedding.weight[ids_BT]
            self.scale = np.float32(_factor(found_BTD[0] - found_BTD[1], bare_BTD[0] - bare_BTD[1], "embedding"))
            if not _alike(found_BTD, float(self.scale) * bare_BTD):
                ids_BS = ids_BT[:1, :1].expand(1, arch.context_tokens)
                with torch.inference_mode(), _without(layers, None) as entered:
                    model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
                self.places_SD = array(entered[0][0] - float(self.scale) * bare_BTD[0, 0])
        if head is not None:
            if norm is None:
                raise NotLean("no norm before the head")
            with torch.inference_mode():
                bare = head(norm(rows_BTD))
            self.shape = _shaping(logits, bare, getattr(model.config, "final_logit_softcapping", None))


def _as_is(_: Array) -> None:
    return None


def _factor(found: Tensor, bare: Tensor, what: str) -> float:
    factor = float((found * bare).sum() / (bare * bare).sum())
    if not _alike(found, factor * bare):
        raise NotLean(f"more than a factor of the {what}")
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _alike(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(found.abs().max()))


def _shaping(found: Tensor, bare: Tensor, cap: float | None) -> Callable[[Array], None]:
    if cap is not None:
        outer = np.float32(cap * _factor(found, torch.tanh(bare / cap) * cap, "capped logits"))

        def capped(logits_V: Array) -> None:
            logits_V /= np.float32(cap)
            np.tanh(logits_V, out=logits_V)
            logits_V *= outer

        return capped
    factor = np.float32(_factor(found, bare, "logits"))
    if factor == 1:
        return _as_is

    def scaled(logits_V: Array) -> None:
        logits_V *= factor

    return scaled


@contextmanager
def _without(layers: Sequence[SplitLayer], rows_BTD: Tensor | None) -> Iterator[list[Tensor]]:
    """Layers that give these rows whatever goes in, or without them what goes in; what went into them."""
    entered: list[Tensor] = []

    def given(layer: SplitLayer) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            entered.append(hidden_states)
            out = hidden_states if rows_BTD is None else rows_BTD
            return (out, *[None] * (layer.layout.tuple_size - 1)) if layer.layout.tuple_size else out

        return forward

    for layer in layers:
        layer.forward = given(layer)  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        for layer in layers:
            del layer.forward
