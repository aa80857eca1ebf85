"""The attention and the FFN of one layer, filled with what a device holds of them: HF's own modules, narrower.

What cannot be cut (one head group, one FFN unit) is read whole. Knows no placement and no wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from splitray.arch import ModelArch, Range
from splitray.model.added_experts import add_experts
from splitray.model.layout import LayerLayout
from splitray.model.slice_reader import SliceReader
from splitray.model.slicing import Cut, is_experts


def read_attention(
    layer: nn.Module,
    layout: LayerLayout,
    *,
    cuts: Mapping[str, Cut],
    arch: ModelArch,
    reader: SliceReader,
    groups: tuple[Range, ...],
    bias: bool,
) -> nn.Module:
    """Read the held head groups into a layer's attention; `bias` says whether this device adds row-parallel ones."""
    attention: nn.Module = getattr(layer, layout.attention)
    if arch.num_kv_heads == 1:
        reader.read_all(attention)
        return attention
    held = sum(r.count for r in groups)
    if held != arch.num_kv_heads:
        reader.narrow_counts(attention, held)
    for path, module in attention.named_modules():
        cut = cuts.get(f"{layout.attention}.{path}")
        if cut is not None:
            reader.read_cut(module, cut, groups, arch.num_kv_heads, bias)
        else:
            reader.read_per_head(module, groups)
    return attention


def read_ffn(
    layer: nn.Module,
    layout: LayerLayout,
    *,
    cuts: Mapping[str, Cut],
    arch: ModelArch,
    reader: SliceReader,
    columns: tuple[Range, ...],
    bias: bool,
) -> nn.Module:
    """Read the held FFN units into a layer's FFN; `bias` says whether this device adds row-parallel ones."""
    for name in layout.ffn:
        for path, module in getattr(layer, name).named_modules(prefix=name):
            cut = cuts.get(path)  # where others have experts, in as many equal parts as those
            if arch.ffn_dim > 1 and cut is not None:
                reader.read_cut(module, cut, columns, arch.ffn_dim, bias)
            elif arch.ffn_dim > 1 and is_experts(path, module, arch.num_experts):
                reader.read_experts(module, columns)
            else:
                reader.read_own(module)  # a router: every holder needs all of it
    body = ffn_of(layer, layout)
    if arch.num_experts and reader.in_blocks:
        add_experts(body, row_parallel(layer, cuts))
    return body


def row_parallel(layer: nn.Module, cuts: Mapping[str, Cut]) -> list[nn.Module]:
    """The projections of a layer whose outputs are partial sums, the biases of all added by one device."""
    return [layer.get_submodule(path) for path, cut in cuts.items() if cut.side == "in"]


def ffn_of(layer: nn.Module, layout: LayerLayout) -> nn.Module:
    """The one module of a layer's FFN, or those that it lists (OPT) one after the other."""
    modules: Sequence[nn.Module] = [getattr(layer, name) for name in layout.ffn]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
