"""Norms of one row, or of the heads in it: which form a module of HF's has is found by trying it on two rows.

Shapes: D features of a row, N heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from splitray.model.lean.linears import array
from splitray.model.lean.not_lean import NotLean
from splitray.model.split_layer import Array

_SCALES = (1.0, 1e-3)  # of the rows that are tried: a small one tells how much is added to the mean of squares


@dataclass(frozen=True, slots=True)
class NormForm:
    """weight * x / sqrt(mean of x^2 + eps) + bias, of x less its mean if it is `centred`."""

    centred: bool
    weight: Array
    bias: Array | None
    eps: float

    def of(self, x_D: Array) -> Array:
        """What it makes of one row."""
        if self.centred:
            x_D = x_D - x_D.mean()
        y: Array = x_D / np.sqrt((x_D * x_D).mean() + self.eps) * self.weight
        return y if self.bias is None else y + self.bias


def norm_form(module: nn.Module, size: int) -> NormForm:
    """The form of a norm over the last `size` features.

    Raises:
        NotLean: it has another one.
    """
    rows = [s * (np.random.default_rng(0).standard_normal(size) + 0.5).astype(np.float32) for s in _SCALES]
    with torch.inference_mode():
        expected = [module(torch.from_numpy(x)[None, None]).reshape(-1).numpy() for x in rows]
    for form in _candidates(module, size):
        if all(np.allclose(form.of(x), y, rtol=1e-4, atol=1e-5) for x, y in zip(rows, expected, strict=True)):
            return form
    raise NotLean(f"{type(module).__name__} is another norm")


def _candidates(module: Any, size: int) -> Iterator[NormForm]:
    weight, bias = array(getattr(module, "weight", None)), array(getattr(module, "bias", None))
    ones = np.ones(size, np.float32)
    if any(v is not None and v.shape != (size,) for v in (weight, bias)):
        return
    named = [float(getattr(module, n)) for n in ("variance_epsilon", "eps") if hasattr(module, n)]
    for eps in named or (1e-6, 1e-5):
        for centred in (False, True):
            for each in (ones,) if weight is None else (weight, ones + weight):
                yield NormForm(centred, each, bias, eps)


def row_norm(form: NormForm | None) -> Callable[[Array], Array]:
    """The norm of one row into a new one; without a form, the row as it is."""
    if form is None:
        return lambda x: x
    if form.centred or form.bias is not None:
        return form.of
    weight, size, eps = form.weight, len(form.weight), form.eps

    def norm(x: Array) -> Array:
        h: Array = x * weight
        h *= np.float32(1.0 / np.sqrt(np.dot(x, x) / size + eps))
        return h

    return norm


def normed(norm: Callable[[Array], Array], x_ND: Array) -> Array:
    """The norm of each row by itself."""
    return np.stack([norm(x_D) for x_D in x_ND])


def heads_norm(form: NormForm) -> Callable[[Array], None]:
    """The norm of each head in place.

    Raises:
        NotLean: the mean is taken off.
    """
    weight, eps = form.weight, form.eps
    if form.centred or form.bias is not None:
        raise NotLean("heads are normalised about their mean")

    def norm(x_Nd: Array) -> None:
        x_Nd *= weight / np.sqrt((x_Nd * x_Nd).mean(-1, keepdims=True) + eps)

    return norm


def settling(form: NormForm | None, scale: float) -> Callable[[Array, Array], Array]:
    """For families that normalise the sum of a sub-block: (x, sum) -> x + scale * norm(sum), a new row."""
    norm, factor = row_norm(form), np.float32(scale)

    def settle(x_D: Array, y_D: Array) -> Array:
        h = norm(y_D) * factor
        h += x_D
        return h

    return settle
