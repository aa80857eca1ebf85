"""What a family does to the rows of the embedding and to the logits, seen by running HF's model without its layers.

Shapes: B = 1, T tokens, D hidden, V vocabulary rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitray.model.lean.not_lean import NotLean
from splitray.model.split_layer import Array, SplitLayer

_TOKENS = 2


class Ends:
    """`scale` of the embedding's rows, and what `shapes` the logits, in place."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[SplitLayer],
        hidden: int,
        *,
        embedding: Any,
        norm: nn.Module | None,
        head: Any,
    ) -> None:
        """Run what is held of both; an end that is not held is None.

        Raises:
            NotLean: more is done than the loop can do.
        """
        self.scale = np.float32(1)
        self.shape: Callable[[Array], None] = _as_is
        rows_TD = torch.randn(1, _TOKENS, hidden, generator=torch.Generator().manual_seed(0))
        inputs: dict[str, Any] = {"inputs_embeds": torch.zeros(1, _TOKENS, hidden)}
        if embedding is not None:
            tokens = torch.linspace(0, embedding.weight.shape[0] - 1, _TOKENS + 1)[1:].long()
            inputs = {"input_ids": tokens[None]}
        if embedding is None and head is None:
            return
        with torch.inference_mode(), _without(layers, rows_TD) as entered:
            logits = model(**inputs, use_cache=False).logits
            if embedding is not None:
                self.scale = np.float32(_factor(entered[0], embedding.weight[tokens][None], "embedding"))
            if head is not None:
                if norm is None:
                    raise NotLean("no norm before the head")
                self.shape = _shaping(
                    logits, head(norm(rows_TD)), getattr(model.config, "final_logit_softcapping", None)
                )


def _as_is(_: Array) -> None:
    return None


def _factor(found: Tensor, bare: Tensor, what: str) -> float:
    factor = float((found * bare).sum() / (bare * bare).sum())
    if not torch.allclose(found, factor * bare, rtol=1e-4, atol=1e-5 * float(found.abs().max())):
        raise NotLean(f"more than a factor of the {what}")
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _shaping(found: Tensor, bare: Tensor, cap: float | None) -> Callable[[Array], None]:
    if cap is not None:
        _factor(found, torch.tanh(bare / cap) * cap, "capped logits")

        def capped(logits_V: Array) -> None:
            logits_V /= np.float32(cap)
            np.tanh(logits_V, out=logits_V)
            logits_V *= np.float32(cap)

        return capped
    factor = np.float32(_factor(found, bare, "logits"))
    if factor == 1:
        return _as_is

    def scaled(logits_V: Array) -> None:
        logits_V *= factor

    return scaled


@contextmanager
def _without(layers: Sequence[SplitLayer], rows_TD: Tensor) -> Iterator[list[Tensor]]:
    """Layers that give these rows whatever goes in; what went into them."""
    entered: list[Tensor] = []

    def given(layer: SplitLayer) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            entered.append(hidden_states)
            return (rows_TD, *[None] * (layer.layout.tuple_size - 1)) if layer.layout.tuple_size else rows_TD

        return forward

    for layer in layers:
        layer.forward = given(layer)  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        for layer in layers:
            del layer.forward
