"""Linears with their weights transposed, [inputs, outputs]; HF's modules become views of the same memory.

OpenBLAS reads 13-22 GB/s of them on one core where torch's linear reads 9-14 of the usual layout.

Shapes: I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitray.model.split_layer import Array
from splitray.model.weights.held import HeldLinear, held

Projection: TypeAlias = nn.Linear | Conv1D


def array(tensor: Tensor | None) -> Array | None:
    """A numpy view of a tensor."""
    return None if tensor is None else tensor.detach().numpy()


def transpose(linears: Sequence[Projection]) -> tuple[Array, Array | None]:
    """Weights of linears with one input side by side as [inputs, outputs], and their biases.

    The linears' own weights become views of it, so nothing is held twice. A Conv1D, which has them so, comes alone.
    """
    if isinstance(linears[0], Conv1D):
        (module,) = linears
        weight = module.weight.detach().numpy()
        module.forward = partial(_multiply, weight, module.bias)  # type: ignore[method-assign]
        return weight, array(module.bias)
    joint = linears[0].weight.new_empty((linears[0].weight.shape[1], sum(m.weight.shape[0] for m in linears)))
    at = 0
    for module in linears:
        rows = module.weight.shape[0]
        joint[:, at : at + rows] = module.weight.t()
        module.weight = nn.Parameter(joint[:, at : at + rows].t(), requires_grad=False)
        module.forward = partial(_multiply, joint.numpy()[:, at : at + rows], module.bias)  # type: ignore[method-assign]
        at += rows
    biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
    return joint.numpy(), array(torch.cat(biases)) if biases else None


def project(linears: Sequence[Projection]) -> Callable[[Array], Array]:
    """Linears with one input as one product: of a row, or of several, with weights transposed or in few bits."""
    few = [held(m) for m in linears]
    if few[0] is not None:
        return partial(_by_held, few)
    return _product(*transpose(linears))


def _product(weight_IO: Array, bias_O: Array | None) -> Callable[[Array], Array]:
    if bias_O is None:
        return weight_IO.__rmatmul__

    def with_bias(x: Array) -> Array:
        y: Array = x @ weight_IO
        y += bias_O
        return y

    return with_bias


def _by_held(few: Sequence[HeldLinear], x: Array) -> Array:
    ys: list[Any] = [linear(np.atleast_2d(x)) for linear in few]
    y: Array = ys[0] if len(ys) == 1 else np.concatenate(ys, axis=-1)
    return y if x.ndim == 2 else y[0]


def _multiply(weight_IO: Array, bias_O: Tensor | None, x_BTI: Tensor) -> Tensor:
    """What the linear computes, for prompts and batches too: OpenBLAS multiplies a sixth faster than torch here."""
    y = torch.from_numpy(x_BTI.flatten(0, -2).numpy() @ weight_IO)
    return (y if bias_O is None else y.add_(bias_O)).view(*x_BTI.shape[:-1], weight_IO.shape[1])


def transpose_experts(module: Any, name: str) -> Array:
    """Stacked weights of experts as [experts, inputs, outputs], the module's own a view of it."""
    weight: Tensor = getattr(module, name)
    if module.is_transposed:
        return weight.detach().numpy()
    turned_EIO = weight.transpose(1, 2).contiguous()
    setattr(module, name, nn.Parameter(turned_EIO.transpose(1, 2), requires_grad=False))
    return turned_EIO.numpy()


def project_head(head: Any, embedding: nn.Embedding | None) -> Callable[[Array], Array]:
    """The head's product; a tied table turns as a whole, since embedding one token reads one column of it."""
    tied = (
        embedding is not None
        and held(head) is None
        and head.weight.untyped_storage().data_ptr() == embedding.weight.untyped_storage().data_ptr()
    )
    if not tied or embedding is None:
        return project((head,))
    first = head.weight.storage_offset() // embedding.weight.shape[1]
    rows = head.weight.shape[0]
    turned = embedding.weight.t().contiguous()
    embedding.weight = nn.Parameter(turned.t(), requires_grad=False)
    head.weight = nn.Parameter(turned[:, first : first + rows].t(), requires_grad=False)
    return _product(turned.numpy()[:, first : first + rows], array(head.bias))
