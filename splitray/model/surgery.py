"""One device's part of a Hugging Face decoder: built on the meta device, then only the held slices are read.

No model is rewritten: HF's own classes run, with narrower linears, and SplitLayer in place of each layer. Knows the
placement of one device, not the wire.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch, Range
from splitray.errors import unsplittable
from splitray.model.absent import Skip, absent
from splitray.model.config import depth_of
from splitray.model.kv_cache import places_of
from splitray.model.layout import Layouts, is_norm, layer_arguments
from splitray.model.lean.loop import LeanLoop
from splitray.model.lean.not_lean import NotLean
from splitray.model.lengths import RopeLength
from splitray.model.pieces import ffn_of, read_attention, read_ffn
from splitray.model.qk_norm import share_norm_sums
from splitray.model.slice_reader import SliceReader, Source
from splitray.model.slicing import Cut, read_cuts
from splitray.model.split_layer import Exchange, LocalSubBlock, SplitLayer, WholeLayer
from splitray.model.weights.held import Matrix, held, hold, linear_of

S = TypeVar("S", SplitLayer, WholeLayer)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """What one device holds of one layer; `bias` says whether it is the one that adds row-parallel biases."""

    groups: tuple[Range, ...] = ()
    columns: tuple[Range, ...] = ()
    attention_bias: bool = False
    ffn_bias: bool = False
    attention_post: bool = False
    ffn_post: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """What one device holds of the whole model."""

    layers: tuple[LayerShare, ...]
    embedding: bool
    vocab_rows: tuple[Range, ...]


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a config without memory, its computed buffers (rotary tables) made for real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    name_of = {module: name for name, module in model.named_modules()}
    owners = {name: module for module, name in name_of.items() if isinstance(module, PreTrainedModel)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:  # drawn by a function that heeds no device
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        computed = [n for n, b in module.named_buffers(recurse=False) if b is not None and b.is_meta]
        if computed:
            for name in computed:
                buffer = getattr(module, name)
                keep = name not in module._non_persistent_buffers_set
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=keep)
            owner = max((o for o in owners if name_of[module].startswith(o)), key=len)
            owners[owner]._init_weights(module)
    return model.eval()


def decoder_of(model: PreTrainedModel, num_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the list of layers, and the list's name."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, name
    lists = [f"{len(m)} in {n}" for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and ".0." not in n]
    expected, actual = f"one list of its {num_layers} layers", ", ".join(lists) or "none"
    raise unsplittable(f"architecture {model.config.model_type}", expected, actual)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers."""
    decoder, name = decoder_of(model, depth_of(model.config))
    return getattr(decoder, name)  # type: ignore[no-any-return]


class Shard:
    """The slices that one device holds, and the model code that runs them."""

    def __init__(
        self,
        *,
        config: PretrainedConfig,
        arch: ModelArch,
        layout: Layouts,
        spec: ShardSpec,
        source: Source,
        exchange: Exchange,
        torch_device: str = "cpu",
        reuse: Shard | None = None,
    ) -> None:
        """Read the held slices from the source into this device's memory.

        `reuse` is a shard of the same model, device and exchange: what both hold is shared, not read again. It stays
        usable.
        """
        self.arch, self.layout, self.spec = arch, layout, spec
        self.source, self.exchange = source, exchange
        self.device, self.dtype = torch.device(torch_device), DTYPES[arch.dtype]
        self.model = meta_model(config, self.dtype)
        self._names = {module: name for name, module in self.model.named_modules()}
        self.reader = SliceReader(source=source, names=self._names, arch=arch, dtype=self.dtype)
        decoder, layers_name = decoder_of(self.model, arch.num_layers)
        layers = getattr(decoder, layers_name)
        self.rope = RopeLength(decoder, self.model.config)
        self.embedding: Any = self.model.get_input_embeddings()
        self.head: Any = self.model.get_output_embeddings()
        self._reuse = reuse
        same_ends = reuse is not None and _ends_of(reuse.spec) == _ends_of(spec)
        if reuse is not None and same_ends:
            self._take_ends(decoder, reuse)
        else:
            self._ends(decoder)
        for i in range(arch.num_layers):
            layers[i] = self._whole(layers[i], i) if layout.whole else self._layer(layers[i], i)
        self.layers: nn.ModuleList = layers
        self.decoder = decoder
        for module in self.model.modules():
            if module in self._names:
                self.reader.read_buffers(module)
        self._names = {}
        self._reuse = None
        self.lean: LeanLoop | None = None
        left = [n for n, p in self.model.named_parameters() if p.is_meta]
        if left:
            raise unsplittable(
                f"architecture {arch.name}", "weights in layers, embeddings and head", f"also {left[:3]}"
            )
        self.model.to(self.device)  # type: ignore[arg-type]

    def make_lean(self, reuse: LeanLoop | None = None) -> None:
        """Use the lean loop for single-token steps; the caller knows from the self-test that it is exact.

        `reuse` is the loop of the shard that this one shares modules with.
        """
        layers = [layer for layer in self.layers if isinstance(layer, SplitLayer)]
        if self.device.type != "cpu":
            return
        with contextlib.suppress(NotLean):
            self.lean = LeanLoop(
                model=self.model,
                layers=layers,
                arch=self.arch,
                layout=self.layout,
                rotary=getattr(self.decoder, "rotary_emb", None),
                embedding=self.embedding if self.spec.embedding else None,
                norm=next((m for m in self.decoder.children() if is_norm(m)), None),
                head=self.head if self.spec.vocab_rows else None,
                exchange=self.exchange,
                reuse=reuse,
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the distinct parameter storages held (a tied or fused tensor once)."""
        return weight_bytes([self])

    @torch.inference_mode()
    def forward(
        self,
        *,
        cache: Any,
        tokens_BT: Tensor | None,
        batch: int,
        new_tokens: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep: int = 1,
        length: int | None = None,
    ) -> Tensor:
        """Run one step through HF's own model forward.

        `length` in tokens is that of the whole of which this is a part, where the model depends on it.

        Returns:
            This device's logits [batch, kept positions, its vocabulary rows]; no columns if it holds none.
        """
        if self.lean is not None and batch == 1 and attention_mask is None and position_ids is None:
            if new_tokens == 1:
                return self.lean.step(cache, tokens_BT)
            if self.arch.sums_in_blocks:  # a row is then the same bits in a prompt and alone
                tokens = None if tokens_BT is None else tokens_BT[0].tolist()
                return self.lean.rows(places_of(cache, new_tokens), tokens, keep)
        inputs: dict[str, Any]
        if self.spec.embedding:
            assert tokens_BT is not None, "an embedding holder needs the tokens"
            inputs = {"input_ids": tokens_BT.to(self.device)}
        else:
            shape = (batch, new_tokens, self.arch.hidden_dim)
            inputs = {"inputs_embeds": torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device).expand(shape)}
        if position_ids is None:
            start = cache.position
            position_ids = torch.arange(start, start + new_tokens).expand(batch, -1)
        self.rope.begin(cache, position_ids, length)
        out = self.model(
            **inputs,
            attention_mask=None if attention_mask is None else attention_mask.to(self.device),
            position_ids=position_ids.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits  # type: ignore[no-any-return]

    def _take_ends(self, decoder: nn.Module, other: Shard) -> None:
        for name, child in list(decoder.named_children()):
            if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                setattr(decoder, name, getattr(other.decoder, name))
        parent, _, child_name = self._names[self.head].rpartition(".")
        setattr(self.model.get_submodule(parent), child_name, other.head)
        self.embedding, self.head = other.embedding, other.head

    def _ends(self, decoder: nn.Module) -> None:
        hidden, spec, layout = self.arch.hidden_dim, self.spec, self.layout
        self._table: Matrix | None = None
        self.reader.read_own(decoder)
        for name, child in list(decoder.named_children()):
            if name not in layout.before + layout.after:
                continue
            if spec.embedding and child is self.embedding:
                self._table = self.reader.read_table(child)
            elif spec.vocab_rows if name in layout.after else spec.embedding:
                self.reader.read_all(child)
            elif child is self.embedding:
                self.embedding.weight = nn.Parameter(torch.empty(0, hidden, dtype=self.dtype), requires_grad=False)
            else:
                setattr(decoder, name, absent(child, hidden, self.dtype))
        self._head()

    def _head(self) -> None:
        head, name, rows = self.head, self._names[self.head], list(self.spec.vocab_rows)
        if not rows:
            parent, _, child = name.rpartition(".")
            self.head = Skip()
            setattr(self.model.get_submodule(parent), child, self.head)
            return
        shares_table = self.arch.tied_embeddings and self.spec.embedding
        own = f"{name}.weight"
        stored = own if self.source.key(own) else f"{self._names[self.embedding]}.weight"
        count = sum(r.count for r in rows)
        if getattr(head, "bias", None) is not None:
            head.bias = self.reader.parameter(self.source.read(f"{name}.bias", ranges=rows))
        head.out_features = count
        if self.arch.format.is_held:
            table = self._table.taken(rows) if shares_table and self._table is not None else None
            hold(head, linear_of([table or self.reader.read_rows(stored, rows)], head.bias, sums=False))
            return
        if shares_table and len(rows) == 1:
            table = self.embedding.weight
            weight = table[rows[0].start : rows[0].stop]
        elif shares_table:
            weight = torch.cat([self.embedding.weight[r.start : r.stop] for r in rows])
        else:
            weight = self.source.read(stored, ranges=rows).to(self.dtype)
        head.weight = nn.Parameter(weight, requires_grad=False)

    def _whole(self, layer: nn.Module, i: int) -> WholeLayer:
        held, layout = bool(self.spec.layers[i].groups), self.layout.of(i)
        kept: Any = None if self._reuse is None else self._reuse.layers[i]
        module = layer if held else None
        if held and kept is not None and kept.layer is not None:
            module = kept.layer
        elif held:
            self.reader.read_all(layer)
        split = WholeLayer(layout=layout, exchange=self.exchange, index=1 + i, layer=module)
        return _named_as(split, layer)

    def _layer(self, layer: nn.Module, i: int) -> SplitLayer:
        layout, share, arch, reader = self.layout.of(i), self.spec.layers[i], self.arch, self.reader
        step = 1 if layout.parallel else 2
        post_norm, index = self.layout.has_post_norm, 1 + i * step
        cuts = read_cuts(layer, layout, self.model.config, arch)
        old = self._kept(i)

        def norm(name: str | None, needed: bool) -> nn.Module | None:
            if name is None or not needed:
                return None
            module = getattr(layer, name)
            self.reader.read_all(module)
            return module

        parts = [
            old[0]
            or LocalSubBlock(
                norm=norm(layout.attention_norm, bool(share.groups)),
                body=self._attention(layer, i, cuts) if share.groups else None,
                post=norm(layout.attention_post_norm, share.attention_post),
                scale=layout.residual_scale,
                post_norm=post_norm,
            ),
            old[1]
            or LocalSubBlock(
                norm=norm(layout.ffn_norm, bool(share.columns)),
                body=_first_of(
                    read_ffn(
                        layer, layout, cuts=cuts, arch=arch, reader=reader, columns=share.columns, bias=share.ffn_bias
                    )
                )
                if share.columns
                else None,
                post=norm(layout.ffn_post_norm, share.ffn_post),
                scale=layout.residual_scale,
                post_norm=post_norm,
            ),
        ]
        split = SplitLayer(
            layout=layout,
            exchange=self.exchange,
            argument_names=layer_arguments(layer),
            index=index,
            attention=parts[0],
            ffn=parts[1],
        )
        split.attention_module = getattr(layer, layout.attention) if share.groups else None
        split.ffn_module = ffn_of(layer, layout) if share.columns else None
        if self._reuse is not None:
            before: Any = self._reuse.layers[i]
            split.attention_module = before.attention_module if old[0] else split.attention_module
            split.ffn_module = before.ffn_module if old[1] else split.ffn_module
        return _named_as(split, layer)

    def _kept(self, i: int) -> tuple[LocalSubBlock | None, LocalSubBlock | None]:
        """Sub-blocks of a layer that the other shard holds just so; where both run in parallel, both or none."""
        if self._reuse is None:
            return None, None
        there: Any = self._reuse.layers[i]
        was, now = self._reuse.spec.layers[i], self.spec.layers[i]
        attention = (was.groups, was.attention_bias, was.attention_post) == (
            now.groups, now.attention_bias, now.attention_post)  # fmt: skip
        ffn = (was.columns, was.ffn_bias, was.ffn_post) == (now.columns, now.ffn_bias, now.ffn_post)
        if self.layout.parallel:
            attention = ffn = attention and ffn
        return there.attention if attention else None, there.ffn if ffn else None

    def _attention(self, layer: nn.Module, i: int, cuts: Mapping[str, Cut]) -> Callable[..., Tensor]:
        arch, share = self.arch, self.spec.layers[i]
        attention = read_attention(layer, self.layout.of(i), cuts=cuts, arch=arch, reader=self.reader,
                                   groups=share.groups, bias=share.attention_bias)  # fmt: skip
        if arch.qk_norm_over_heads:
            index = 1 + 2 * i
            share_norm_sums(
                attention,
                lambda sums: self.exchange.sum_over_holders(index, sums),
                q_features=arch.num_heads * arch.head_dim,
                k_features=arch.num_kv_heads * arch.head_dim,
            )
        return _first_of(attention)


def _first_of(module: nn.Module) -> Callable[..., Tensor]:
    """The module's output without what it returns beside it."""

    def body(x_BTD: Tensor, **arguments: Any) -> Tensor:
        out = module(x_BTD, **arguments)
        out = out[0] if isinstance(out, tuple | list) else out
        return out.view(x_BTD.shape)  # type: ignore[no-any-return]  # some flatten the batch

    return body


def _named_as(split: S, layer: nn.Module) -> S:
    """Give a layer's stand-in what HF's model loop reads off its layers, such as attention_type."""
    for name, value in vars(layer).items():
        if not name.startswith("_") and name not in vars(split):
            setattr(split, name, value)
    return split


def weight_bytes(shards: Sequence[Shard]) -> int:
    """Bytes of the distinct parameter storages of shards: what they share counts once."""
    storages = [p.untyped_storage() for s in shards for p in s.model.parameters()]
    few = {id(h): h.num_bytes for s in shards for m in s.model.modules() if (h := held(m)) is not None}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + sum(few.values())


def _ends_of(spec: ShardSpec) -> tuple[bool, tuple[Range, ...]]:
    return spec.embedding, spec.vocab_rows
