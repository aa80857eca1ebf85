"""One token of one sequence through llama-like layers, on numpy views of the very weights that HF's modules hold.

A decode step is bound by reading weights, so they lie transposed, [inputs, outputs]: OpenBLAS then reads 13-22 GB/s
on one core where torch's linear reads 9-14 of the usual layout. HF's linears become views of the same memory. numpy's
small operations cost a third of torch's, which counts because a split does not halve them. Float32 on a CPU only;
used where the self-test finds it exact (runtime/selftest.py), everything else runs HF's own forward.

Shapes: D hidden, H heads here, G KV groups here, R = H / G, d head_dim, S positions so far, F columns here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from splitray.arch import ModelArch
from splitray.model.kv_cache import KvCache
from splitray.model.layout import Layouts
from splitray.model.split_layer import Array, Exchange, LocalSubBlock, SplitLayer

_ROPES = ("default", "linear", "llama3", "yarn")  # the others change their table with the length
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_FFN = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def can_be_lean(
    layout: Layouts,
    arch: ModelArch,
    config: PretrainedConfig,
    rotary: Any,
    final_norm: nn.Module | None,
    layers: Sequence[SplitLayer],
) -> bool:
    """Whether the layers have the form that the lean loop computes; its exactness is the self-test's to say."""
    if layout.whole or layout.parallel or layout.has_post_norm:
        return False
    if any(x.residual_scale != 1.0 or len(x.ffn) != 1 for x in layout.different):
        return False
    if getattr(config, "sliding_window", None) is not None or getattr(rotary, "rope_type", None) not in _ROPES:
        return False
    if 2 * rotary.inv_freq.shape[0] != arch.head_dim or arch.dtype != "float32":
        return False
    types = getattr(config, "layer_types", None) or ()
    if any(t != "full_attention" for t in types) or getattr(config, "no_rope_layers", None):
        return False
    norms = [n for x in layers for n in (x.attention.norm, x.ffn.norm) if n is not None]
    norms += [final_norm] if final_norm is not None else []
    if not all("RMSNorm" in type(n).__name__ for n in norms):
        return False
    return all(_attention_fits(x.attention_module) and _ffn_fits(x.ffn_module) for x in layers)


def _attention_fits(module: nn.Module | None) -> bool:
    if module is None:
        return True
    return {n for n, _ in module.named_children()} in (_ATTENTION, _ATTENTION | {"q_norm", "k_norm"})


def _ffn_fits(module: Any) -> bool:
    if module is None:
        return True
    return {n for n, _ in module.named_children()} == _FFN and "SiLU" in type(module.act_fn).__name__


def _array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.detach().numpy()


def _transpose(linears: Sequence[nn.Linear]) -> tuple[Array, Array | None]:
    """Weights of linears with one input side by side as [inputs, outputs], and their biases.

    The linears' own weights become views of it, so nothing is held twice.
    """
    joint = linears[0].weight.new_empty((linears[0].weight.shape[1], sum(m.weight.shape[0] for m in linears)))
    at = 0
    for module in linears:
        rows = module.weight.shape[0]
        joint[:, at : at + rows] = module.weight.t()
        module.weight = nn.Parameter(joint[:, at : at + rows].t(), requires_grad=False)
        module.forward = partial(_multiply, joint.numpy()[:, at : at + rows], module.bias)  # type: ignore[method-assign]
        at += rows
    biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
    return joint.numpy(), _array(torch.cat(biases)) if biases else None


def _multiply(weight_IO: Array, bias_O: Tensor | None, x_BTI: Tensor) -> Tensor:
    """What the linear computes, for prompts and batches too: OpenBLAS multiplies a sixth faster than torch here."""
    y = torch.from_numpy(x_BTI.reshape(-1, weight_IO.shape[0]).numpy() @ weight_IO)
    return (y if bias_O is None else y.add_(bias_O)).view(*x_BTI.shape[:-1], weight_IO.shape[1])


def _head(head: Any, embedding: nn.Embedding | None) -> tuple[Array | None, Array | None]:
    """The head's rows transposed; a tied table turns as a whole, since embedding one token reads one column of it."""
    if head is None:
        return None, None
    tied = (
        embedding is not None
        and head.weight.untyped_storage().data_ptr() == embedding.weight.untyped_storage().data_ptr()
    )
    if not tied or embedding is None:
        return _transpose((head,))
    first = head.weight.storage_offset() // embedding.weight.shape[1]
    rows = head.weight.shape[0]
    turned = embedding.weight.t().contiguous()
    embedding.weight = nn.Parameter(turned.t(), requires_grad=False)
    head.weight = nn.Parameter(turned[:, first : first + rows].t(), requires_grad=False)
    return turned.numpy()[:, first : first + rows], _array(head.bias)


def _norm(module: Any) -> Callable[[Array], Array]:
    weight = module.weight.detach().numpy()
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    size = weight.shape[0]

    def norm(x: Array) -> Array:
        h: Array = x * weight
        h *= np.float32(1.0 / np.sqrt(np.dot(x, x) / size + eps))
        return h

    return norm


def _head_norm(module: Any) -> Callable[[Array], None]:
    weight = module.weight.detach().numpy()
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))

    def norm(x_Nd: Array) -> None:
        x_Nd *= weight / np.sqrt((x_Nd * x_Nd).mean(-1, keepdims=True) + eps)

    return norm


class _Attention:
    def __init__(self, layer: SplitLayer, index: int, arch: ModelArch) -> None:
        module: Any = layer.attention_module
        assert module is not None and layer.attention.norm is not None, "only held, pre-norm attention is lean"
        self.index, self.d = index, arch.head_dim
        self.groups = module.k_proj.weight.shape[0] // self.d
        self.heads = module.q_proj.weight.shape[0] // self.d
        self.weight, self.bias = _transpose((module.q_proj, module.k_proj, module.v_proj))
        self.out, self.out_bias = _transpose((module.o_proj,))
        self.norm = _norm(layer.attention.norm)
        self.q_norm = _head_norm(module.q_norm) if hasattr(module, "q_norm") else None
        self.k_norm = _head_norm(module.k_norm) if hasattr(module, "k_norm") else None
        self.scale = np.float32(module.scaling)
        self._turned = np.empty((self.heads + self.groups, self.d), np.float32)

    def partial(self, x_D: Array, cache: KvCache, cos_d: Array, sin_d: Array) -> Array:
        heads, groups, d, turned = self.heads, self.groups, self.d, self._turned
        qkv = self.norm(x_D) @ self.weight
        if self.bias is not None:
            qkv += self.bias
        qkv = qkv.reshape(heads + 2 * groups, d)
        qk = qkv[: heads + groups]
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(qk[:heads])
            self.k_norm(qk[heads:])
        half = d // 2
        turned[:, :half], turned[:, half:] = qk[:, half:], qk[:, :half]
        turned *= sin_d
        qk *= cos_d
        qk += turned
        keys_GSd, values_GSd = cache.arrays(self.index, groups, d)
        at = cache.position
        keys_GSd[:, at] = qk[heads:]
        values_GSd[:, at] = qkv[heads + groups :]
        q_GRd = qk[:heads].reshape(groups, heads // groups, d)
        q_GRd *= self.scale
        weights_GRS = q_GRd @ keys_GSd[:, : at + 1].transpose(0, 2, 1)
        weights_GRS -= weights_GRS.max(-1, keepdims=True)
        np.exp(weights_GRS, out=weights_GRS)
        weights_GRS /= weights_GRS.sum(-1, keepdims=True)
        y: Array = (weights_GRS @ values_GSd[:, : at + 1]).reshape(-1) @ self.out  # type: ignore[assignment]
        if self.out_bias is not None:
            np.add(y, self.out_bias, out=y)
        return y


class _Ffn:
    def __init__(self, layer: SplitLayer) -> None:
        module: Any = layer.ffn_module
        assert module is not None and layer.ffn.norm is not None, "only held, pre-norm FFNs are lean"
        self.columns = module.gate_proj.weight.shape[0]
        self.weight, self.bias = _transpose((module.gate_proj, module.up_proj))
        self.out, self.out_bias = _transpose((module.down_proj,))
        self.norm = _norm(layer.ffn.norm)

    def partial(self, x_D: Array) -> Array:
        both = self.norm(x_D) @ self.weight
        if self.bias is not None:
            both += self.bias
        gate_F, up_F = both[: self.columns], both[self.columns :]
        up_F *= gate_F
        np.negative(gate_F, out=gate_F)
        np.exp(gate_F, out=gate_F)  # overflows to inf where silu is 0
        gate_F += 1
        up_F /= gate_F
        y: Array = up_F @ self.out  # type: ignore[assignment]
        if self.out_bias is not None:
            np.add(y, self.out_bias, out=y)
        return y


class LeanLoop:
    """Single-token steps over the held pieces, boundary by boundary."""

    def __init__(
        self,
        *,
        layers: Sequence[SplitLayer],
        arch: ModelArch,
        rotary: Any,
        embedding: nn.Embedding | None,
        norm: nn.Module | None,
        head: Any,
        exchange: Exchange,
        reuse: LeanLoop | None = None,
    ) -> None:
        """Take over the shard's weights, transposed in place of HF's own layout.

        Modules that a loop to `reuse` has taken over already stay as they are.
        """
        self.exchange, self.rotary = exchange, rotary
        self._ends = (embedding, head)
        self.head: Array | None
        self.head_bias: Array | None
        self.table: Array | None
        if reuse is not None and reuse._ends == self._ends:
            self.head, self.head_bias, self.table = reuse.head, reuse.head_bias, reuse.table
        else:
            self.head, self.head_bias = _head(head, embedding)
            self.table = _array(embedding.weight) if embedding is not None else None
        held: dict[LocalSubBlock, Any] = {} if reuse is None else reuse.held
        self.attention: list[_Attention | None] = [
            (held.get(x.attention) or _Attention(x, i, arch)) if x.attention_module else None
            for i, x in enumerate(layers)
        ]
        self.ffn: list[_Ffn | None] = [(held.get(x.ffn) or _Ffn(x)) if x.ffn_module else None for x in layers]
        self.held: dict[LocalSubBlock, Any] = {}
        for layer, attention, ffn in zip(layers, self.attention, self.ffn, strict=True):
            self.held |= {layer.attention: attention, layer.ffn: ffn}
        self.norm = _norm(norm) if head is not None and norm is not None else None
        self._cos_Sd = self._sin_Sd = np.empty((0, 0), np.float32)

    def step(self, cache: KvCache, tokens_BT: Tensor | None) -> Tensor:
        """One new token of one sequence; this device's logits [1, 1, rows] (no rows if it holds none)."""
        if cache.position >= self._cos_Sd.shape[0]:
            self._tables(cache.capacity)
        cos_d, sin_d = self._cos_Sd[cache.position], self._sin_Sd[cache.position]
        x: Array | None = None
        if self.table is not None:
            assert tokens_BT is not None, "an embedding holder needs the tokens"
            x = np.ascontiguousarray(self.table[int(tokens_BT[0, 0])])
        cross = self.exchange.cross_row
        x = cross(0, x, None)
        index = 1
        with np.errstate(over="ignore"):
            for attention, ffn in zip(self.attention, self.ffn, strict=True):
                y = None if attention is None or x is None else attention.partial(x, cache, cos_d, sin_d)
                x = cross(index, x, y)
                y = None if ffn is None or x is None else ffn.partial(x)
                x = cross(index + 1, x, y)
                index += 2
        if self.head is None or self.norm is None or x is None:
            return torch.empty(1, 1, 0)
        logits: Array = self.norm(x) @ self.head
        if self.head_bias is not None:
            logits += self.head_bias
        return torch.from_numpy(logits).view(1, 1, -1)

    def _tables(self, positions: int) -> None:
        like = torch.empty(0)  # the table's dtype and device
        cos, sin = self.rotary(like, position_ids=torch.arange(positions)[None])
        half = sin.shape[-1] // 2
        self._cos_Sd = cos[0].numpy()
        self._sin_Sd = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).numpy()  # half turn and sign at once
