"""What a decoder looks like to a planner: counts and sizes, no torch, no weights, no devices."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from splitray.errors import InputError, ModelError
from splitray.weight_formats import ROWS, StoredWeights, WeightFormat, as_format

_SMALL = 1 << 20  # weights of a matrix


class Range(NamedTuple):
    """Half-open range [start, stop) of KV groups, FFN columns (or experts) or vocabulary rows."""

    start: int
    stop: int

    @property
    def count(self) -> int:  # type: ignore[override]  # a range counts its indices, not its two fields
        """How many indices the range holds."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArch:
    """Counts of a decoder and the three traits of its dataflow that change what devices exchange.

    `ffn_dim` counts the units in which an FFN is cut: columns, or whole experts if `num_experts` > 0.
    `parallel_block`: attention and FFN read the same input and form one sub-block (GPT-NeoX, GPT-J, Cohere).
    `post_norm`: the sum of a sub-block is normalised before the residual is added (Gemma 2, OLMo 2).
    `qk_norm_over_heads`: q and k are normalised over all heads together (OLMo 2), one more small exchange.
    `whole_layers`: nobody knows how a layer can be cut; it is one head group and one FFN unit, always together.
    `tokens_everywhere`: layers read the tokens, so that every device with a piece of one holds the embedding, too.
    `streams`: residuals that go from layer to layer side by side (Gemma 3n).
    `kv_layers`: for each layer the one whose KV it reads, where some read another's; who holds one holds both.
    `kv_slots`: caches of keys and values that a layer has, as those with two attentions.
    `attention_params`, `ffn_params` and `kv_values` (of one token) are means over the layers, where their counts are
    not those of attention and FFNs of equal heads and columns; `embedding_params` are tables beside the embedding.
    `head_rows`: rows of a head group's smallest projection, where those are no whole heads (a gate for each head).
    `experts_apart`: experts are stacked in another form than transformers' usual one, or what they give is not added to
    the FFN's sum as it is; such are held in plain floats only.
    `weight_bits` is the mean size of a quantised weight, for planning; None where weights have the `dtype`.
    `weights` names the format in which devices hold them (weight_formats.py), `device_weights` that of each device
    where they differ: see `on`. `stored` is that of the checkpoint. With `fixed_sums` the sums of a model that any
    device holds quantised are made block by block, so that they are the same bits wherever its pieces are.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    ffn_dim: int
    vocab: int
    context_tokens: int
    ffn_matrices: int = 3
    num_experts: int = 0
    expert_columns: int = 0
    tied_embeddings: bool = False
    parallel_block: bool = False
    post_norm: bool = False
    qk_norm_over_heads: bool = False
    whole_layers: bool = False
    tokens_everywhere: bool = False
    streams: int = 1
    head_rows: int | None = None
    experts_apart: bool = False
    kv_layers: tuple[int, ...] = ()
    kv_slots: int = 1
    attention_params: int | None = None
    ffn_params: int | None = None
    kv_values: int | None = None
    embedding_params: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weight_bits: float | None = None
    weights: str = "float32"
    device_weights: tuple[tuple[str, str], ...] = ()
    stored: StoredWeights | None = None
    fixed_sums: bool = True

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "ffn_dim", "vocab")
        for field in counts:
            if getattr(self, field) < 1:
                raise ModelError(
                    f"{self.name}: {field}",
                    expected="at least 1",
                    actual=getattr(self, field),
                    remedy="correct the model's config.json",
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.name}: num_heads",
                expected=f"a multiple of num_kv_heads = {self.num_kv_heads}",
                actual=self.num_heads,
                remedy="correct the model's config.json",
            )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight or activation element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def format(self) -> WeightFormat:
        """How devices hold the weights of linears."""
        return as_format(self.weights)

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """All in which devices hold weights."""
        named = dict.fromkeys(w for _, w in self.device_weights) or (self.weights,)
        return tuple(map(as_format, named))

    def on(self, device: str) -> "ModelArch":
        """The same with `weights` as this device holds them."""
        return _on(self, device) if self.device_weights else self

    @property
    def is_quantised(self) -> bool:
        """Whether any device holds weights that share scales."""
        return any(f.is_quantised for f in self.formats)

    @property
    def auto_weights(self) -> str:
        """The format of the checkpoint; float32 in the place of 16 bits where matrices are so small that it is faster.

        A call of the kernel for 16 bits costs what multiplying by half a million weights costs.
        """
        if self.stored is None:
            return "float32"
        is_plain = not as_format(self.stored.format).is_quantised
        is_small = self.hidden_dim * (self.expert_columns or self.ffn_dim) < _SMALL
        return "float32" if is_plain and is_small else self.stored.format

    @property
    def as_stored(self) -> bool:
        """Whether devices hold the whole numbers that the checkpoint has, where it has some."""
        return self.stored is not None and self.stored.resident_bits is not None and self.weights == self.stored.format

    @property
    def sums_in_blocks(self) -> bool:
        """Whether partial sums are made in fixed blocks, and cross as float64."""
        return self.is_quantised and self.fixed_sums

    @property
    def partial_bytes(self) -> int:
        """Bytes of one element of a partial sum."""
        return 8 if self.sums_in_blocks else self.dtype_bytes

    @property
    def ffn_cuts(self) -> tuple[int, ...]:
        """The borders at which FFN columns may be cut, those of the largest groups; empty: at any."""
        return () if self.num_experts or self.ffn_dim == 1 else self.column_cuts(self.ffn_dim)

    def column_cuts(self, columns: int) -> tuple[int, ...]:
        """The same for so many columns, as those of a shared expert, which are cut beside experts."""
        coarsest = max(self.formats, key=lambda f: f.group)
        return coarsest.ffn_cuts(columns)

    @property
    def bits(self) -> float:
        """What a weight of a linear takes in memory."""
        if self.as_stored and self.stored is not None and self.stored.resident_bits is not None:
            return self.stored.resident_bits
        if self.format.is_held:
            return self.format.resident_bits
        return 8 * self.dtype_bytes if self.weight_bits is None else self.weight_bits

    def weight_bytes(self, num_params: int) -> int:
        """Bytes that so many weights of linears take."""
        return round(num_params * self.bits / 8)

    def table_bytes(self, num_params: int) -> int:
        """Bytes that so many weights of the embedding's or the head's rows take: 8 bits each beside linears of 4."""
        bits = self.format.table.resident_bits if self.format.is_held else self.bits
        return round(num_params * bits / 8)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding, with the tables that some models keep beside it, which are never rounded."""
        beside = round(self.embedding_params * (8 * self.dtype_bytes if self.format.is_held else self.bits) / 8)
        return self.table_bytes(self.vocab * self.vocab_row_params) + beside

    @property
    def shares_table(self) -> bool:
        """Whether a tied head takes no memory beside the embedding; a kernel keeps its rows in a form of its own."""
        return self.tied_embeddings and not self.format.is_held

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_params(self) -> int:
        """Weights of a head group without biases: its rows of q, k, v and its columns of o (docs/equations.md E1.8)."""
        if self.attention_params is not None:
            return -(-self.attention_params // self.num_kv_heads)
        return self.hidden_dim * self.head_dim * (2 * self.heads_per_group + 2)

    @property
    def ffn_unit_params(self) -> int:
        """Weights of one FFN column, or of one whole expert (docs/equations.md E1.9)."""
        if self.ffn_params is not None:
            return -(-self.ffn_params // self.ffn_dim)
        columns = self.expert_columns if self.num_experts else 1
        return self.ffn_matrices * self.hidden_dim * columns

    @property
    def vocab_row_params(self) -> int:
        """Weights of one vocabulary row of the embedding or of the head."""
        return self.hidden_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one head group of one layer for one token (docs/equations.md E1.10)."""
        if self.kv_values is not None:
            return -(-self.kv_values // self.num_kv_heads) * self.dtype_bytes
        return 2 * self.head_dim * self.dtype_bytes

    @property
    def num_params(self) -> int:
        """All weights but norms and biases (a tied embedding counted once)."""
        layer = self.num_kv_heads * self.group_params + self.ffn_dim * self.ffn_unit_params
        tables = (1 if self.tied_embeddings else 2) * self.vocab * self.vocab_row_params
        return self.num_layers * layer + tables + self.embedding_params

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights but norms and biases (a table that head and embedding share counted once)."""
        head = 0 if self.shares_table else self.table_bytes(self.vocab * self.vocab_row_params)
        layers = self.num_layers * (self.num_kv_heads * self.group_params + self.ffn_dim * self.ffn_unit_params)
        return self.weight_bytes(layers) + self.embedding_bytes + head

    @property
    def grain(self) -> str:
        """The pieces into which a layer can be cut, in words."""
        if self.whole_layers:
            return "whole layers"
        groups = "attention whole" if self.num_kv_heads == 1 else f"{self.num_kv_heads} head groups"
        units = "FFN whole" if self.ffn_dim == 1 else f"{self.ffn_dim} {'experts' if self.num_experts else 'columns'}"
        return f"{groups}, {units}"


@cache
def _on(arch: ModelArch, device: str) -> ModelArch:
    return replace(arch, weights=dict(arch.device_weights).get(device, arch.weights))


def held_by(arch: ModelArch, weights: Mapping[str, str], *, sums: str = "fixed", lean: bool = True) -> ModelArch:
    """The counts of a model that each of some devices holds in a format of its own; `arch` has plain weights.

    Raises:
        InputError: see `held_as`.
    """
    formats = [*dict.fromkeys(weights.values())]
    if len(formats) == 1:
        return held_as(arch, formats[0], sums=sums, lean=lean)
    for name in formats:
        held_as(arch, name, sums=sums, lean=lean)
    return replace(arch, device_weights=tuple(sorted(weights.items())), fixed_sums=sums == "fixed")


def held_as(arch: ModelArch, weights: str, *, sums: str = "fixed", lean: bool = True) -> ModelArch:
    """The counts of a model whose weights are held in a format.

    `lean` says whether the lean loop runs the model: only that makes sums in fixed blocks.

    Raises:
        InputError: there is no such format, or none in which this model can be run.
    """
    kind = as_format(weights)
    if not kind.is_held:
        return arch
    what, instead, rows = f"weights {weights}", "use --weights float32", arch.head_rows or arch.head_dim
    if arch.dtype != "float32":
        raise InputError(what, expected="--dtype float32 beside it", actual=arch.dtype, remedy="leave --dtype out")
    if arch.whole_layers or arch.experts_apart:
        actual = "layers that nobody can cut" if arch.whole_layers else "stacked experts of another form"
        expected = "layers of linears, and experts whose sums are added as they are"
        raise ModelError(f"{arch.name}: {what}", expected=expected, actual=actual, remedy=instead)
    apart = [
        (not lean, "a model that the lean loop runs", "another form"),
        (arch.qk_norm_over_heads, "q and k normalised head by head", "a norm over all heads"),
        (rows % ROWS > 0, f"heads of a multiple of {ROWS} features", f"{rows} features"),
    ]
    for is_so, expected, actual in apart:
        if is_so and kind.is_quantised and sums == "fixed":
            raise ModelError(f"{arch.name}: {what} --sums fixed", expected=expected, actual=actual,
                             remedy="use --sums fast: tokens may then depend on the placement")  # fmt: skip
    return replace(arch, weights=weights, fixed_sums=sums == "fixed")
