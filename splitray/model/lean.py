"""One token through llama-like layers without the frame around HF's modules: the same weights, fewer calls.

Used for single-token steps where the self-test found it exact (runtime/selftest.py); everything else runs HF's own
forward. q, k, v and gate, up lie in one buffer each, of which HF's linears are views.

Shapes: B batch, D hidden, H heads here, G KV groups here, R = H / G, d head_dim, S positions so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from splitray.arch import ModelArch
from splitray.model.kv_cache import KvCache
from splitray.model.layout import LayerLayout
from splitray.model.split_layer import Exchange, SplitLayer

_ROPES = ("default", "linear", "llama3", "yarn")  # the others change their table with the length


def can_be_lean(
    layout: LayerLayout,
    arch: ModelArch,
    config: PretrainedConfig,
    rotary: Any,
    final_norm: nn.Module | None,
    layers: Sequence[SplitLayer],
) -> bool:
    """Whether the layers have the form that the lean loop computes; its exactness is the self-test's to say."""
    if layout.parallel or layout.has_post_norm or layout.residual_scale != 1.0 or len(layout.ffn) != 1:
        return False
    if getattr(config, "sliding_window", None) is not None or getattr(rotary, "rope_type", None) not in _ROPES:
        return False
    if 2 * rotary.inv_freq.shape[0] != arch.head_dim:
        return False
    types = getattr(config, "layer_types", None) or ()
    if any(t != "full_attention" for t in types) or getattr(config, "no_rope_layers", None):
        return False
    norms = [n for x in layers for n in (x.attention.norm, x.ffn.norm) if n is not None]
    norms += [final_norm] if final_norm is not None else []
    if not all("RMSNorm" in type(n).__name__ for n in norms):
        return False
    return all(_attention_fits(layer.attention_module) and _ffn_fits(layer.ffn_module) for layer in layers)


def _attention_fits(module: nn.Module | None) -> bool:
    if module is None:
        return True
    names = {n for n, _ in module.named_children()}
    return names in (
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    )


def _ffn_fits(module: nn.Module | None) -> bool:
    return module is None or {n for n, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for several linears of one input, which become views of it."""
    weights: list[Tensor] = [m.weight for m in linears]
    weight = torch.cat(weights)
    at = 0
    for module in linears:
        rows = module.weight.shape[0]
        module.weight = nn.Parameter(weight[at : at + rows], requires_grad=False)
        at += rows
    biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    shape = (weight.shape[0],)
    return lambda x: F.rms_norm(x, shape, weight, eps)


class _Attention:
    def __init__(self, layer: SplitLayer, index: int, arch: ModelArch) -> None:
        module: Any = layer.attention_module
        assert module is not None and layer.attention.norm is not None, "only held, pre-norm attention is lean"
        self.index, self.d = index, arch.head_dim
        self.weight, self.bias = _fuse((module.q_proj, module.k_proj, module.v_proj))
        self.out, self.out_bias = module.o_proj.weight, module.o_proj.bias
        self.groups = module.k_proj.weight.shape[0] // self.d
        self.heads = module.q_proj.weight.shape[0] // self.d
        self.norm = _norm(layer.attention.norm)
        self.q_norm = _norm(module.q_norm) if hasattr(module, "q_norm") else None
        self.k_norm = _norm(module.k_norm) if hasattr(module, "k_norm") else None
        self.scale = float(module.scaling)

    def partial(self, x_B1D: Tensor, cache: KvCache, cos_d: Tensor, sin_d: Tensor) -> Tensor:
        batch, heads, groups, d = x_B1D.shape[0], self.heads, self.groups, self.d
        qkv = F.linear(self.norm(x_B1D), self.weight, self.bias).view(batch, heads + 2 * groups, d)
        qk, v_BGd = qkv[:, : heads + groups], qkv[:, heads + groups :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])], dim=1)
        qk = torch.addcmul(qk * cos_d, qk.roll(d // 2, -1), sin_d)
        keys, values = cache.slots(self.index, batch, groups, (d, d), qk)
        at = cache.position
        keys[:, :, at] = qk[:, heads:]
        values[:, :, at] = v_BGd
        q_BGRd = qk[:, :heads].view(batch, groups, heads // groups, d)  # one query position: R heads stand for it
        out = F.scaled_dot_product_attention(q_BGRd, keys[:, :, : at + 1], values[:, :, : at + 1], scale=self.scale)
        return F.linear(out.reshape(batch, 1, heads * d), self.out, self.out_bias)


class _Ffn:
    def __init__(self, layer: SplitLayer) -> None:
        module: Any = layer.ffn_module
        assert module is not None and layer.ffn.norm is not None, "only held, pre-norm FFNs are lean"
        self.weight, self.bias = _fuse((module.gate_proj, module.up_proj))
        self.out, self.out_bias = module.down_proj.weight, module.down_proj.bias
        self.act = module.act_fn
        self.norm = _norm(layer.ffn.norm)

    def partial(self, x_B1D: Tensor) -> Tensor:
        gate, up = F.linear(self.norm(x_B1D), self.weight, self.bias).chunk(2, dim=-1)
        return F.linear(self.act(gate).mul_(up), self.out, self.out_bias)


class LeanLoop:
    """Single-token steps over the held pieces, boundary by boundary."""

    def __init__(
        self,
        *,
        layers: Sequence[SplitLayer],
        layout: LayerLayout,
        arch: ModelArch,
        rotary: Any,
        table: Tensor | None,
        norm: nn.Module | None,
        head: Any,
        exchange: Exchange,
    ) -> None:
        """Take over the shard's weights; nothing is copied but q, k, v and gate, up into common buffers."""
        self.exchange, self.rotary, self.table = exchange, rotary, table
        self.attention = [_Attention(x, i, arch) if x.attention_module else None for i, x in enumerate(layers)]
        self.ffn = [_Ffn(x) if x.ffn_module else None for x in layers]
        self.head = head
        self.norm = _norm(norm) if head is not None and norm is not None else None
        self._cos_Sd = self._sin_Sd = torch.empty(0, 0)

    def step(self, cache: KvCache, tokens_BT: Tensor | None, batch: int) -> Tensor:
        """One new token for each of `batch` sequences; this device's logits [batch, 1, rows]."""
        if cache.position >= self._cos_Sd.shape[0]:
            self._tables(cache.capacity)
        cos_d, sin_d = self._cos_Sd[cache.position], self._sin_Sd[cache.position]
        x: Tensor | None = None
        if self.table is not None:
            assert tokens_BT is not None, "an embedding holder needs the tokens"
            x = F.embedding(tokens_BT.to(self.table.device), self.table)
        cross = self.exchange.cross
        x = cross(0, x, None, None)
        index = 1
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            y = None if attention is None or x is None else attention.partial(x, cache, cos_d, sin_d)
            x = cross(index, x, y, None)
            y = None if ffn is None or x is None else ffn.partial(x)
            x = cross(index + 1, x, y, None)
            index += 2
        if self.head is None or self.norm is None or x is None:
            return cos_d.new_empty((batch, 1, 0))
        return F.linear(self.norm(x), self.head.weight, self.head.bias)

    def _tables(self, positions: int) -> None:
        weights = [p.out for p in (*self.attention, *self.ffn) if p is not None]
        weights += [w for w in (self.table, self.head and self.head.weight) if w is not None]
        like = weights[0].new_empty(0)  # the table's dtype and device
        cos, sin = self.rotary(like, position_ids=torch.arange(positions, device=like.device)[None])
        half = sin.shape[-1] // 2
        self._cos_Sd = cos[0]
        self._sin_Sd = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)  # roll + sign = rotate_half
