"""One token of one sequence through the held pieces, boundary by boundary.

A decode step is bound by reading weights. numpy's small operations cost a third of torch's, which counts because a
split does not halve them. Float32 on a CPU only; used where every module has a form that is known here and the
self-test finds the whole exact (runtime/selftest.py). Everything else runs HF's own forward.

Shapes: D hidden, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitray.arch import ModelArch
from splitray.model.kv_cache import KvCache, Place
from splitray.model.layout import Layouts
from splitray.model.lean.attention import Attention
from splitray.model.lean.ends import Ends
from splitray.model.lean.ffn import read_ffn
from splitray.model.lean.linears import array, project_head
from splitray.model.lean.norms import norm_form, normed, row_norm, settling
from splitray.model.lean.not_lean import NotLean, trying
from splitray.model.lean.own_attention import OwnAttention
from splitray.model.lean.rope import Ropes
from splitray.model.split_layer import Array, Exchange, LocalSubBlock, SplitLayer
from splitray.model.weights.held import held

Settle = Callable[[Array, Array], Array]


class LeanPiece(Protocol):
    """What a layer's attention and its FFN are to the loop."""

    def take_over(self) -> None:
        """Transpose the weights in place of HF's own layout."""

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        """This device's partial sum for a residual, a row of its own; attention writes KV."""

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        """The same for the rows of a step, bit by bit what each one would be alone where weights are quantised."""


class LeanLoop:
    """Single-token steps over the held pieces."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        layers: Sequence[SplitLayer],
        arch: ModelArch,
        layout: Layouts,
        rotary: Any,
        embedding: nn.Embedding | None,
        norm: nn.Module | None,
        head: Any,
        exchange: Exchange,
        reuse: LeanLoop | None = None,
    ) -> None:
        """Take over the shard's weights, transposed in place of HF's own layout.

        Modules that a loop to `reuse` has taken over already stay as they are.

        Raises:
            NotLean: some module has a form that is not known here; nothing has been changed then.
        """
        if layout.whole or arch.tokens_everywhere or arch.kv_layers:
            raise NotLean("layers of another wiring")
        if arch.dtype != "float32":
            raise NotLean("weights of another type")
        self.exchange = exchange
        hidden, config, known = arch.hidden_dim, model.config, {} if reuse is None else reuse.held
        self.ropes: Ropes = Ropes(rotary, config, None if reuse is None else reuse.ropes)

        def attention_of(i: int, layer: SplitLayer) -> LeanPiece | None:
            if layer.attention_module is None or layer.attention in known:
                return known.get(layer.attention)
            try:
                with trying():
                    piece: LeanPiece = Attention(layer, i, hidden, config, self.ropes)
            except NotLean:
                piece = OwnAttention(layer, i, hidden, config, rotary)
            return _scaled(piece, layer.attention)

        def ffn_of(layer: SplitLayer) -> LeanPiece | None:
            if layer.ffn_module is None or layer.ffn in known:
                return known.get(layer.ffn)
            return _scaled(read_ffn(layer, hidden), layer.ffn)

        with trying():
            self.attention = [attention_of(i, x) for i, x in enumerate(layers)]
            self.ffn = [ffn_of(x) for x in layers]
            self._settles = [_settles(x, hidden) for x in layers]
            norm_of_all = None if norm is None else norm_form(norm, hidden)
            self.norm = row_norm(norm_of_all) if head is not None else None
            self._held_ends = (embedding, head)
            same = reuse if reuse is not None and reuse._held_ends == self._held_ends else None
            self._ends: Ends = (
                same._ends if same else Ends(model, layers, arch, embedding=embedding, norm=norm, head=head)
            )
        self._through = self._at_once if layout.parallel else self._settled if layout.has_post_norm else self._added
        self.held: dict[LocalSubBlock, LeanPiece | None] = {}
        for layer, attention, ffn in zip(layers, self.attention, self.ffn, strict=True):
            self.held |= {layer.attention: attention, layer.ffn: ffn}
        for part, piece in self.held.items():  # from here on nothing is refused any more
            if piece is not None and part not in known:
                piece.take_over()
        self.head: Callable[[Array], Array] | None = None
        self.table: Any = None  # rows by tokens
        if same:
            self.head, self.table = same.head, same.table
        else:
            if head is not None:
                self.head = project_head(head, embedding)
            if embedding is not None:
                self.table = held(embedding) or array(embedding.weight)

    def step(self, cache: KvCache, tokens_BT: Tensor | None) -> Tensor:
        """One new token of one sequence; this device's logits [1, 1, rows] (no rows if it holds none)."""
        self.ropes.reach(cache.position + 1, cache.capacity)
        x: Array | None = None
        if self.table is not None:
            assert tokens_BT is not None, "an embedding holder needs the tokens"
            x = self._embedded(int(tokens_BT[0, 0]), cache.position)
        with np.errstate(over="ignore"):
            x = self._through(x, cache)
        if self.head is None or self.norm is None or x is None:
            return torch.empty(1, 1, 0)
        logits = self.head(self.norm(x))
        self._ends.shape(logits)
        return torch.from_numpy(logits).view(1, 1, -1)

    def rows(self, places: Sequence[Place], tokens: Sequence[int] | None, keep: int) -> Tensor:
        """New tokens of one sequence or of several, each as `step` computes it; logits [1, keep, rows] of the last.

        The steps of all their caches are open, and tokens of one sequence follow each other.
        """
        self.ropes.reach(max(p.position for p in places) + 1, max(p.cache.capacity for p in places))
        x: Array | None = None
        if self.table is not None:
            assert tokens is not None, "an embedding holder needs the tokens"
            x = np.stack([self._embedded(t, p.position) for t, p in zip(tokens, places, strict=True)])
        with np.errstate(over="ignore"):
            x = self._rows_through(x, places)
        if self.head is None or self.norm is None or x is None:
            return torch.empty(1, keep, 0)
        logits_NV = self.head(normed(self.norm, x[-keep:]))
        for logits in logits_NV:
            self._ends.shape(logits)
        return torch.from_numpy(logits_NV)[None]

    def _embedded(self, token: int, position: int) -> Array:
        x: Array = self.table[token] * self._ends.scale
        if self._ends.places_SD is not None:
            x += self._ends.places_SD[position]
        return x

    def _rows_through(self, x_ND: Array | None, places: Sequence[Place]) -> Array | None:
        """Through the layers of any family with the rows of a step."""

        def leave(index: int, x_ND: Array | None, y_ND: Array | None, settle: Settle | None) -> Array | None:
            def settle_rows(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
                assert settle is not None, "a family that normalises sums"
                rows = zip(x_BTD[0].numpy(), y_BTD[0].numpy(), strict=True)
                return torch.from_numpy(np.stack([settle(x_D, y_D) for x_D, y_D in rows]))[None]

            x, y = (None if rows is None else torch.from_numpy(rows)[None] for rows in (x_ND, y_ND))
            out = self.exchange.cross(index, x, y, None if settle is None else settle_rows)
            return None if out is None else out[0].numpy()

        post_norm = self._through == self._settled
        x_ND, index = leave(0, x_ND, None, None), 1
        for attention, ffn, settles in zip(self.attention, self.ffn, self._settles, strict=True):
            halves = ((attention, ffn),) if self._through == self._at_once else ((attention,), (ffn,))
            for pieces, settle in zip(halves, settles, strict=False):
                ys = [p.partials(x_ND, places) for p in pieces if p is not None and x_ND is not None]
                y_ND = sum(ys[1:], ys[0]) if ys else None
                x_ND = leave(index, x_ND, y_ND, settle if post_norm else None)
                index += 1
        return x_ND

    def _added(self, x: Array | None, cache: KvCache) -> Array | None:
        """Through the layers of a family that adds sums to the residual as they are."""
        cross = self.exchange.cross_row
        x = cross(0, x, None)
        index = 1
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            y = None if attention is None or x is None else attention.partial(x, cache)
            x = cross(index, x, y)
            y = None if ffn is None or x is None else ffn.partial(x, cache)
            x = cross(index + 1, x, y)
            index += 2
        return x

    def _at_once(self, x: Array | None, cache: KvCache) -> Array | None:
        """Through those of a family whose halves read one residual."""
        cross = self.exchange.cross_row
        x = cross(0, x, None)
        for index, pieces in enumerate(zip(self.attention, self.ffn, strict=True), start=1):
            y: Array | None = None
            for piece in pieces if x is not None else ():
                if piece is not None and x is not None:
                    y = piece.partial(x, cache) if y is None else y + piece.partial(x, cache)
            x = cross(index, x, y)
        return x

    def _settled(self, x: Array | None, cache: KvCache) -> Array | None:
        """Through those of a family that normalises sums first."""
        cross = self.exchange.settle_row
        x = cross(0, x, None, self._settles[0][0])
        index = 1
        for attention, ffn, (settle_attention, settle_ffn) in zip(self.attention, self.ffn, self._settles, strict=True):
            y = None if attention is None or x is None else attention.partial(x, cache)
            x = cross(index, x, y, settle_attention)
            y = None if ffn is None or x is None else ffn.partial(x, cache)
            x = cross(index + 1, x, y, settle_ffn)
            index += 2
        return x


class _Scaled:
    """A piece whose sum counts by a factor (granite)."""

    def __init__(self, piece: LeanPiece, scale: float) -> None:
        self.piece, self.scale, self.take_over = piece, np.float32(scale), piece.take_over

    def partials(self, x_ND: Array, places: Sequence[Place]) -> Array:
        y = self.piece.partials(x_ND, places)
        y *= self.scale
        return y

    def partial(self, x_D: Array, cache: KvCache) -> Array:
        y = self.piece.partial(x_D, cache)
        y *= self.scale
        return y


def _scaled(piece: LeanPiece, part: LocalSubBlock) -> LeanPiece:
    return piece if part.scale == 1.0 or part.post_norm else _Scaled(piece, part.scale)


def _settles(layer: SplitLayer, hidden: int) -> tuple[Settle, Settle]:
    attention, ffn = (
        settling(None if part.post is None else norm_form(part.post, hidden), part.scale)
        for part in (layer.attention, layer.ffn)
    )
    return attention, ffn
