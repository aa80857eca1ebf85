"""Attention of one token over the KV of the held heads: full or within a window, with sinks or capped logits.

Shapes: N rows, D hidden, H heads here, G KV groups here, R = H / G, d head_dim, S positions attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from splitray.model.kv_cache import KvCache, Place, sliding_windows
from splitray.model.lean.linears import Projection, array, project
from splitray.model.lean.norms import heads_norm, norm_form, normed, row_norm
from splitray.model.lean.not_lean import NotLean
from splitray.model.lean.rope import Ropes
from splitray.model.qk_norm import ProjectBoth
from splitray.model.slicing import features
from splitray.model.split_layer import Array, SplitLayer

_INS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",))
_OUTS = ("o_proj", "dense", "out_proj", "c_proj")
_EARLY, _LATE = ("q_norm", "k_norm"), ("query_layernorm", "key_layernorm")  # before q and k are turned, and after
FOREVER = 1 << 62


class Attention:
    """The held heads of one layer."""

    def __init__(self, layer: SplitLayer, index: int, hidden: int, config: PretrainedConfig, ropes: Ropes) -> None:
        """Read the form of a layer's attention; nothing is changed before `take_over`.

        Raises:
            NotLean: it has a form that is not known here.
        """
        module: Any = layer.attention_module
        self.index = index
        self._projections, self._out = _linears(module)
        self.d = int(getattr(module, "head_dim", 0) or getattr(module, "head_size", 0))
        if not self.d or not hasattr(module, "scaling"):
            raise NotLean(f"{type(module).__name__} does not say how large its heads are, or its scale")
        rows, held = sum(features(m, "out") for m in self._projections), features(self._out, "in")
        self.heads, self.groups = held // self.d, (rows - held) // (2 * self.d)
        if (self.heads + 2 * self.groups) * self.d != rows or not self.groups or self.heads % self.groups:
            raise NotLean("keys and values of another size")
        self._by_head = hasattr(module, "query_key_value")  # q, k and v of one head after the other
        if self._by_head and self.heads != self.groups:
            raise NotLean("groups that are packed by head")
        form = None if layer.attention.norm is None else norm_form(layer.attention.norm, hidden)
        self.norm = row_norm(form)
        self.qk_norm, self.turned_norm = (self._qk_norm(module, *names) for names in (_EARLY, _LATE))
        self.scale = np.float32(module.scaling)
        self.window = window_of(config, index)
        self.rope = ropes.of(layer, index, self.d)
        self._soften = _softening(module)
        self._turned = np.zeros((1, self.heads + self.groups, self.d), np.float32)

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout."""
        self._project, self._sum = project(self._projections), project((self._out,))

    def _qk_norm(self, module: Any, q_name: str, k_name: str) -> Callable[[Array], None] | None:
        if not hasattr(module, q_name):
            return None
        q, k, heads = getattr(module, q_name), getattr(module, k_name), self.heads
        if isinstance(module.q_proj, ProjectBoth):
            return _over_heads(q, k, heads * self.d, module.q_proj.total)
        q_norm, k_norm = heads_norm(norm_form(q, self.d)), heads_norm(norm_form(k, self.d))

        def norm(qk_Nd: Array) -> None:
            q_norm(qk_Nd[:heads])
            k_norm(qk_Nd[heads:])

        return norm

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        """This device's partial sum; writes its keys and values."""
        here = Place(cache, cache.position)
        return self._sum(self._take(self._turn(self._project(self.norm(x_D))[None], [here])[0], here))

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        """As `partial` for the rows of one step, each of which is what it would be alone."""
        q_NGRd = self._turn(self._project(normed(self.norm, x_ND)), places)
        return self._sum(np.stack([self._take(q, place) for q, place in zip(q_NGRd, places, strict=True)]))

    def _turn(self, qkv_NF: Array, places: Sequence[Place]) -> Array:
        """The queries [N, G, R, d] of rows, turned by their positions; writes keys and values.

        What is done to many rows at once here is done to each number by itself, so that a row has the same bits alone.
        """
        count, heads, groups, d = len(qkv_NF), self.heads, self.groups, self.d
        if self._by_head:
            qkv_NF = qkv_NF.reshape(count, heads, 3, d).transpose(0, 2, 1, 3)
        qkv_NHd = qkv_NF.reshape(count, heads + 2 * groups, d)
        qk_NHd = qkv_NHd[:, : heads + groups]
        if self.qk_norm is not None:
            for qk_Hd in qk_NHd:
                self.qk_norm(qk_Hd)
        first_at = places[0].position
        at_N = slice(first_at, first_at + 1) if count == 1 else [place.position for place in places]
        rope = self.rope
        first, second = rope.pairs
        turned_NHd = self._turned if count == 1 else np.zeros(qk_NHd.shape, np.float32)
        turned_NHd[..., first], turned_NHd[..., second] = qk_NHd[..., second], qk_NHd[..., first]
        turned_NHd *= rope.sin_Sd[at_N, None]
        qk_NHd *= rope.cos_Sd[at_N, None]
        qk_NHd += turned_NHd
        if self.turned_norm is not None:
            for qk_Hd in qk_NHd:
                self.turned_norm(qk_Hd)
        for place, key_Gd, value_Gd in zip(places, qk_NHd[:, heads:], qkv_NHd[:, heads + groups :], strict=True):
            keys_GSd, values_GSd = place.cache.arrays(self.index, groups, d)
            keys_GSd[:, place.position] = key_Gd
            values_GSd[:, place.position] = value_Gd
        q_NHd = qk_NHd[:, :heads]
        q_NHd *= self.scale
        return q_NHd.reshape(count, groups, heads // groups, d)

    def _take(self, q_GRd: Array, place: Place) -> Array:
        """What the heads of one row take from the values up to its position, side by side."""
        keys_GSd, values_GSd = place.cache.arrays(self.index, self.groups, self.d)
        at = place.position
        start = at + 1 - self.window if at >= self.window else 0
        weights_GRS: Array = q_GRd @ keys_GSd[:, start : at + 1].transpose(0, 2, 1)  # type: ignore[assignment]
        self._soften(weights_GRS)
        taken_GRd: Array = weights_GRS @ values_GSd[:, start : at + 1]  # type: ignore[assignment]
        return taken_GRd.reshape(-1)


def _linears(module: Any) -> tuple[tuple[Projection, ...], Projection]:
    """The projections to q, k and v in this order, and the one out."""
    children = {n: m for n, m in module.named_children() if not isinstance(m, nn.Dropout)}
    if isinstance(children.get("q_proj"), ProjectBoth):
        children |= {"q_proj": module.q_proj.q_proj, "k_proj": module.q_proj.k_proj}
    norms = {*_EARLY, *_LATE} & set(children)
    out = next((n for n in _OUTS if n in children), "")
    own = {n for n, _ in module.named_parameters(recurse=False)}
    if norms in (set(), set(_EARLY), set(_LATE)) and own <= {"sinks"}:
        for names in _INS:
            linears = tuple(children[n] for n in names if n in children)
            known = all(type(m) in (nn.Linear, Conv1D) for m in (*linears, children.get(out)))
            if set(children) == {*names, out, *norms} and known and len({m.bias is None for m in linears}) == 1:
                return linears, children[out]
    raise NotLean(f"{type(module).__name__} has {sorted({*children, *own})}")


def _over_heads(q: Any, k: Any, q_features: int, total: Callable[[Tensor], Tensor]) -> Callable[[Array], None]:
    """The norms of q and k over all heads, wherever those are; `q_features` are here."""
    parts = [(n.norm.weight.detach().numpy(), n.features, n.eps) for n in (q, k)]

    def norm(qk_Nd: Array) -> None:
        flat = qk_Nd.reshape(-1)
        both = flat[:q_features], flat[q_features:]
        sums = total(torch.tensor([[[np.dot(x, x) for x in both]]])).reshape(-1).tolist()
        for x, squares, (weight, count, eps) in zip(both, sums, parts, strict=True):
            x *= weight
            x *= np.float32(1.0 / np.sqrt(squares / count + eps))

    return norm


def window_of(config: PretrainedConfig, index: int) -> int:
    """How many positions a layer attends to, its own among them.

    Raises:
        NotLean: layers differ in another way than by a window.
    """
    types = getattr(config, "layer_types", None) or ()
    if any(t not in ("full_attention", "sliding_attention") for t in types):
        raise NotLean(f"layers of types {sorted(set(types))}")
    if not sliding_windows(config, config.num_hidden_layers)[index]:
        return FOREVER
    return int(config.sliding_window)


def _softening(module: Any) -> Callable[[Array], None]:
    """The softmax over positions in place, with what a family does to the logits before it."""
    cap, sinks = getattr(module, "attn_logit_softcapping", None), array(getattr(module, "sinks", None))
    if cap is not None and sinks is not None:
        raise NotLean("capped logits and sinks")
    if cap is not None:
        return _capped(np.float32(cap))
    return _softmax if sinks is None else _with_sinks(sinks)


def _softmax(weights_GRS: Array) -> None:
    weights_GRS -= weights_GRS.max(-1, keepdims=True)
    np.exp(weights_GRS, out=weights_GRS)
    weights_GRS /= weights_GRS.sum(-1, keepdims=True)


def _capped(cap: np.float32) -> Callable[[Array], None]:
    def soften(weights_GRS: Array) -> None:
        weights_GRS /= cap
        np.tanh(weights_GRS, out=weights_GRS)
        weights_GRS *= cap
        _softmax(weights_GRS)

    return soften


def _with_sinks(sinks_H: Array) -> Callable[[Array], None]:
    """One more logit for each head that takes its share of the attention to nowhere."""

    def soften(weights_GRS: Array) -> None:
        sinks_GR1 = sinks_H.reshape(*weights_GRS.shape[:2], 1)
        most_GR1 = np.maximum(weights_GRS.max(-1, keepdims=True), sinks_GR1)
        weights_GRS -= most_GR1
        np.exp(weights_GRS, out=weights_GRS)
        weights_GRS /= weights_GRS.sum(-1, keepdims=True) + np.exp(sinks_GR1 - most_GR1)

    return soften
