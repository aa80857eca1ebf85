"""Fills HF modules with slices: each parameter read from a source, cut to what one device holds.

Knows modules and ranges, not layers' wiring, devices or the wire.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitray.arch import ModelArch, Range
from splitray.model.held_experts import HeldExperts, Pair, hold_experts
from splitray.model.layout import is_norm
from splitray.model.lean.experts import stacked_experts
from splitray.model.slicing import Cut, features
from splitray.model.weights.halves import HalfLinear, HalfMatrix
from splitray.model.weights.held import BiasAlone, HeldLinear, Matrix, hold, hold_table, linear_of
from splitray.model.weights.quantised import Quantised, joined, quantise
from splitray.weight_formats import FORMATS, WeightFormat

ROUNDED_AGAIN = "int8"
"""What a matrix becomes beside others that are held as stored, and which is stored in a form that no kernel reads."""
_ROWS_TRIED = 16
_ROWS_AT_ONCE = 4096  # of a table, on the way to few bits
_LOCAL_COUNTS = ("num_heads", "num_attention_heads")


class Source(Protocol):
    """Where slices come from: model/source.py's Checkpoint, or a state dict in memory."""

    bytes_read: int

    def key(self, name: str) -> str | None:
        """The source's key for a parameter, or None."""

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """A tensor or joined ranges of it."""

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """Exactly what is stored of a matrix in whole numbers, of some outputs of it, or block by block of its inputs.

        None: it is not stored so. What a block is made of does not depend on the others that are read with it.
        """

    def read_experts(self, name: str, experts: Sequence[int]) -> Tensor:
        """Some experts of a stacked weight: of gate and up together, or of down."""

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """Exactly what is stored of one of them in whole numbers, [outputs, inputs]; None: it is not stored so."""


class SliceReader:
    """Reads the parameters of modules that were built on the meta device."""

    def __init__(self, *, source: Source, names: Mapping[nn.Module, str], arch: ModelArch, dtype: torch.dtype) -> None:
        """`names` gives each module's path in the whole model."""
        self.source, self.names, self.arch, self.dtype = source, names, arch, dtype
        self._holding = arch.format.is_held
        self.in_blocks = arch.sums_in_blocks and arch.format.is_quantised

    def narrow_counts(self, attention: Any, held: int) -> None:
        """Write the counts of the held heads on an attention module, wherever it keeps such a count."""
        heads, groups = held * self.arch.heads_per_group, self.arch.num_kv_heads
        module: Any  # counts live in attributes that nn.Module does not declare
        for module in attention.modules():
            values = vars(module)
            for name in _LOCAL_COUNTS:
                if name in values:
                    setattr(module, name, heads)
            if "num_key_value_heads" in values:
                module.num_key_value_heads = module.num_key_value_heads * held // groups
            if "split_size" in values:
                module.split_size = heads * self.arch.head_dim
            for name in ("embed_dim", "hidden_size"):
                if name in values:
                    setattr(module, name, heads * self.arch.head_dim)
            if "config" in values:
                config = copy.copy(module.config)
                config.num_attention_heads = heads
                if getattr(config, "num_key_value_heads", None):
                    config.num_key_value_heads = config.num_key_value_heads * held // groups
                module.config = config

    def read_per_head(self, module: nn.Module, groups: tuple[Range, ...]) -> None:
        """Read what the plan does not name inside attention: norms for each head are cut, others read whole."""
        arch = self.arch
        if self._holds(module):
            self._hold(module)
            return
        units = {arch.num_heads: arch.heads_per_group, arch.num_kv_heads: 1}
        if isinstance(module, nn.ModuleList) and len(module) in units:  # stablelm: one norm a head
            each = units[len(module)]
            kept = [m for r in groups for m in list(module)[r.start * each : r.stop * each]]
            for child in kept:
                self.read_all(child)
            module._modules = {str(j): m for j, m in enumerate(kept)}
            return
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            rows = parameter.shape[0]
            sinks = parameter.ndim == 1 and rows == arch.num_heads and not is_norm(module)
            by_head = (parameter.ndim == 2 and rows in units) or sinks
            over_heads = arch.qk_norm_over_heads and rows in {n * arch.head_dim for n in units}
            full = f"{self.names[module]}.{name}"
            if by_head or over_heads:
                per_group = rows // arch.num_kv_heads
                ranges = [Range(r.start * per_group, r.stop * per_group) for r in groups]
                setattr(module, name, self.parameter(self.source.read(full, ranges=ranges)))
            else:
                setattr(module, name, self.parameter(self.source.read(full)))

    def read_experts(self, module: Any, held: tuple[Range, ...]) -> None:
        """Read some whole experts and translate the router's choices to them."""
        experts = [e for r in held for e in range(r.start, r.stop)]
        total, prefix = len(next(module.parameters(recurse=False))), self.names[module]
        if self._holding:
            pairs = (self._expert(module, e) for e in experts)
            hold_experts(module, HeldExperts(module, pairs, sums=self.in_blocks and self.arch.num_experts > 0))
        for name, _ in list(module.named_parameters(recurse=False)):
            stacked, full = name in ("gate_up_proj", "down_proj"), f"{prefix}.{name}"
            found = self.source.read_experts(full, experts) if stacked else self.source.read(full, ranges=held)
            setattr(module, name, self.parameter(found))
        module.num_experts = len(experts)
        module._is_expert_parallel = True  # tells HF that an index past the end means "not here"
        if len(experts) == total:
            return
        local = torch.full((total,), len(experts), dtype=torch.long)
        local[torch.tensor(experts)] = torch.arange(len(experts))

        def to_local(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, weights = args
            mine = local.to(chosen.device)[chosen]
            absent = mine == len(experts)  # HF skips this index; weight 0 guards the kernels that do not
            return hidden, mine, weights.masked_fill(absent, 0.0)

        module.register_forward_pre_hook(to_local)

    def _expert(self, module: Any, expert: int) -> Pair:
        """One expert's two linears in the format, read one after the other."""
        return self._of_expert(module, "gate_up_proj", expert), self._of_expert(module, "down_proj", expert)

    def _of_expert(self, module: Any, part: str, expert: int) -> HeldLinear | HalfLinear:
        name, bias = f"{self.names[module]}.{part}", None
        if hasattr(module, f"{part}_bias"):
            bias = self.source.read(f"{name}_bias", ranges=[Range(expert, expert + 1)])[0]
        kind = self.arch.format
        if self.arch.as_stored:
            found = self.source.read_quantised_expert(name, expert)
            if found is not None:
                return linear_of([found], bias, sums=False)
            kind = FORMATS[ROUNDED_AGAIN]
        (weight,) = self.source.read_experts(name, [expert])
        return linear_of([self._made(weight.t() if module.is_transposed else weight, kind)], bias, sums=False)

    def read_cut(self, module: Any, cut: Cut, held: tuple[Range, ...], total: int, bias: bool) -> None:
        """Read the held part of a projection; `bias` says whether this device adds a row-parallel one's."""
        name = self.names[module]
        ranges = cut.ranges(held, total)
        count = sum(r.count for r in ranges)
        transposed = isinstance(module, Conv1D)
        axis = (0 if cut.side == "out" else 1) ^ int(transposed)
        if getattr(module, "bias", None) is not None:
            if cut.side == "out":
                module.bias = self.parameter(self.source.read(f"{name}.bias", ranges=ranges))
            elif bias:
                module.bias = self.parameter(self.source.read(f"{name}.bias"))
            else:
                module.bias = self.parameter(torch.zeros(module.bias.shape)) if transposed else None
        if not self._holding:
            module.weight = self.parameter(self.source.read(f"{name}.weight", axis=axis, ranges=ranges))
        elif not count and cut.side == "in":  # a device with few experts may have nothing of a shared one
            hold(module, BiasAlone(features(module, "out"), module.bias))
        elif not count:
            module.weight = self.parameter(torch.empty(0, features(module, "in")))
        elif cut.side == "out":
            self._keep(module, self._matrices(module, outputs=ranges))
        else:
            blocks = cut.blocks(ranges, total, self.arch.ffn_cuts) if self.in_blocks else ranges
            self._keep(module, self._matrices(module, blocks=blocks), sums=self.in_blocks)
        if transposed:
            setattr(module, "nf" if cut.side == "out" else "nx", count)
        else:
            setattr(module, "out_features" if cut.side == "out" else "in_features", count)

    def read_all(self, module: nn.Module) -> None:
        """Read every parameter of a module and its children whole."""
        for child in module.modules():
            self.read_own(child)

    def read_own(self, module: nn.Module) -> None:
        """Read every parameter of a module, not those of its children, whole."""
        if self._holds(module):
            self._hold(module)
            return
        if self._holding and stacked_experts(module):
            self.read_experts(module, (Range(0, len(next(module.parameters(recurse=False)))),))
            return
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                full = f"{self.names[module]}.{name}"
                setattr(module, name, self.parameter(self.source.read(full)))

    def read_table(self, embedding: Any) -> Matrix | None:
        """Read an embedding; its rows where they stay in fewer bits."""
        if not self._holding:
            self.read_all(embedding)
            return None
        rows = self.read_rows(f"{self.names[embedding]}.weight", [Range(0, embedding.num_embeddings)])
        hold_table(embedding, rows)
        return rows

    def read_rows(self, name: str, ranges: Sequence[Range]) -> Matrix:
        """Rows of a table in the format, or as they are stored; quantised some thousand at a time."""
        if not self.arch.format.is_quantised:
            return self._half(self.source.read(name, ranges=ranges))
        if self.arch.as_stored:
            found = self.source.read_quantised(name, outputs=ranges)
            if found is not None:
                return found[0]
            one = self.source.read(name, ranges=[Range(ranges[0].start, ranges[0].start + 1)])
            if one.dtype in (torch.bfloat16, torch.float16):
                return HalfMatrix(self.source.read(name, ranges=ranges))
        taken = [
            Range(a, min(a + _ROWS_AT_ONCE, r.stop)) for r in ranges for a in range(r.start, r.stop, _ROWS_AT_ONCE)
        ]
        kind = self.arch.format.table
        return joined([_rounded(self.source.read(name, ranges=[r]), kind) for r in taken])

    def _holds(self, module: nn.Module) -> bool:
        """Whether a whole module is a linear to be held in few bits: not a router or a gate, which decide."""
        linear = self._holding and type(module) in (nn.Linear, Conv1D)
        return linear and features(module, "out") not in (1, self.arch.num_experts)

    def _hold(self, module: Any) -> None:
        name = self.names[module]
        if module.bias is not None:
            module.bias = self.parameter(self.source.read(f"{name}.bias"))
        self._keep(module, self._matrices(module))

    def _matrices(
        self, module: Any, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Matrix]:
        """A linear in the format, some outputs of it, or blocks of its inputs: as stored where that is the format."""
        name, kind, turned = f"{self.names[module]}.weight", self.arch.format, isinstance(module, Conv1D)
        if self.arch.as_stored and not turned:
            found = self.source.read_quantised(name, outputs=outputs, blocks=blocks)
            if found is not None:
                return [*found]
            kind = FORMATS[ROUNDED_AGAIN]
        axis = (0 if blocks is None else 1) ^ int(turned)
        weight = self.source.read(name, axis=axis, ranges=outputs if blocks is None else blocks)
        weight_OI = weight.t() if turned else weight
        sizes = [weight_OI.shape[1]] if blocks is None or not kind.is_quantised else [b.count for b in blocks]
        return [self._made(part, kind) for part in weight_OI.split(sizes, dim=1)]

    def _made(self, weight_OI: Tensor, kind: WeightFormat) -> Matrix:
        return _rounded(weight_OI, kind) if kind.is_quantised else self._half(weight_OI)

    def _keep(self, module: Any, parts: Sequence[Matrix], *, sums: bool = False) -> None:
        hold(module, linear_of(parts, module.bias, sums=sums))

    def _half(self, weight_OI: Tensor) -> HalfMatrix:
        return HalfMatrix(weight_OI.to(getattr(torch, self.arch.weights)).contiguous())

    def read_buffers(self, module: nn.Module) -> None:
        """Read what a checkpoint stores of a module beside its parameters, for example a router's correction."""
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{self.names[module]}.{name}"
            if name in module._non_persistent_buffers_set or not buffer.is_floating_point():
                continue
            if self.source.key(full) is not None:
                setattr(module, name, self.source.read(full).to(buffer.dtype))

    def parameter(self, tensor: Tensor) -> nn.Parameter:
        """A parameter of the shard's dtype that nobody trains."""
        return nn.Parameter(tensor.to(self.dtype), requires_grad=False)


def rounding_error(source: Source, name: str) -> float:
    """How far a stored matrix that must be rounded again comes out from itself, as a part of it: of some rows."""
    weight_OI = source.read(name, ranges=[Range(0, _ROWS_TRIED)]).float()
    found = torch.from_numpy(_rounded(weight_OI, FORMATS[ROUNDED_AGAIN]).values())
    return float((found - weight_OI).norm() / max(float(weight_OI.norm()), torch.finfo(torch.float32).tiny))


def _rounded(weight_OI: Tensor, kind: WeightFormat) -> Quantised:
    return quantise(weight_OI, bits=kind.bits, group=kind.group_of(weight_OI.shape[1]))
