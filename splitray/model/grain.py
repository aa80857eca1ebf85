"""How finely the layers of a model can be cut, by trying it: do the parts of an attention or an FFN add up to it?

The trial is made on HF's own modules of a small random model (the probe), without devices. What does not add up is held
whole; a layer whose halves do not even run by themselves is run whole. Decides nothing about where pieces lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitray.arch import ModelArch, Range
from splitray.errors import ModelError, unsplittable
from splitray.model.added_experts import add_experts
from splitray.model.counts import count
from splitray.model.layer_kinds import FAILURES
from splitray.model.layout import LayerLayout, Layouts, hooked, layer_arguments
from splitray.model.lean.experts import stacked_experts
from splitray.model.pieces import read_attention, read_ffn, row_parallel
from splitray.model.probe import Probe, whole
from splitray.model.slice_reader import SliceReader
from splitray.model.slicing import is_experts, read_cuts
from splitray.model.state_dict_source import StateDictSource
from splitray.model.surgery import layers_of, meta_model

Half = Literal["attention", "ffn"]
HALVES: tuple[Half, Half] = ("attention", "ffn")
_TOLERANCE = 1e-4  # of the largest value: float32 sums in another order


@dataclass(slots=True)
class Passed:
    """What went into and out of the halves of one layer in one forward."""

    given: dict[str, Any]
    shape: tuple[int, ...]
    inputs: dict[Half, Tensor]
    outputs: dict[Half, Tensor]


def tried(arch: ModelArch, probe: Probe, layout: Layouts, model: PreTrainedModel) -> tuple[ModelArch, Layouts]:
    """The counts of a model in the finest pieces that add up in its probe, and its wiring: whole layers if none do.

    Args:
        arch: the model's counts in the finest pieces that are thinkable.
        probe: its probe.
        layout: how that is wired.
        model: the true one on the meta device, whose sizes must allow the pieces.
    """
    if layout.whole:
        return arch, layout
    there = replace(layout, which=tuple(range(len(probe.layers))))
    source = StateDictSource(probe.model)
    small = count(meta_model(probe.model.config, torch.float32), there)
    seen = _halves_seen(probe, there)
    for half in HALVES:
        pieces = arch.num_kv_heads if half == "attention" else arch.ffn_dim
        # norms over all heads need what other holders know: the self-test, which has some, sees whether it adds up
        untried = half == "attention" and arch.qk_norm_over_heads
        if (
            pieces > 1
            and _fits(arch, half, layout, model)
            and (untried or _adds_up(probe, there, seen, small, half, source))
        ):
            continue
        arch, small = _coarser(arch, half), _coarser(small, half)
        if not _adds_up(probe, there, seen, small, half, source):
            wiring = whole(probe, layout.before, layout.after)
            return replace(_whole(arch), streams=wiring.streams), wiring
    if arch.num_experts:
        apart = not _adds_up(probe, there, seen, small, "ffn", source, plainly=True)
    else:
        modules = (m for i, x in enumerate(probe.layers) for n in there.of(i).ffn for m in getattr(x, n).modules())
        apart = any(p.ndim > 2 and not stacked_experts(m) for m in modules for p in m.parameters(recurse=False))
    return replace(arch, experts_apart=apart), layout


def _fits(arch: ModelArch, half: Half, layout: Layouts, model: PreTrainedModel) -> bool:
    """Whether the projections of a half have the sizes for so many equal pieces."""
    alone = _coarser(arch, "ffn" if half == "attention" else "attention")
    try:
        for i, layer in enumerate(layers_of(model)):
            read_cuts(layer, layout.of(i), model.config, alone)
    except ModelError:
        return False
    return True


def _adds_up(
    probe: Probe, layout: Layouts, seen: Sequence[Passed], arch: ModelArch, half: Half, source: StateDictSource,
    *, plainly: bool = False,
) -> bool:  # fmt: skip
    """Whether in every layer of the probe two unequal parts of a half add up to what the whole half gives.

    `seen` is what went through each of its layers, and `arch` says into how many pieces they are cut. `plainly`: the
    same with what experts give added apart from the module around them.
    """
    total = arch.num_kv_heads if half == "attention" else arch.ffn_dim
    at = max(1, total // 3)
    parts = [(Range(0, at),), (Range(at, total),)] if total > 1 else [(Range(0, 1),)]
    try:
        outs = [
            _parts(probe, layout, seen, arch, half, source, part, first=part is parts[0], plainly=plainly)
            for part in parts
        ]
    except (*FAILURES, ModelError):
        return False
    wholes = [x.outputs[half] for x in seen]
    return all(_close(sum(each[1:], each[0]), y) for each, y in zip(zip(*outs, strict=True), wholes, strict=True))


def _parts(
    probe: Probe, layout: Layouts, seen: Sequence[Passed], arch: ModelArch, half: Half, source: StateDictSource,
    part: tuple[Range, ...], *, first: bool, plainly: bool,
) -> list[Tensor]:  # fmt: skip
    """What a part of a half gives in every layer for what the whole half got."""
    model, found = meta_model(probe.model.config, torch.float32), []
    names = {module: name for name, module in model.named_modules()}
    reader = SliceReader(source=source, names=names, arch=arch, dtype=torch.float32)
    for i, layer in enumerate(layers_of(model)):
        wired = layout.of(i)
        known: Any = {
            "cuts": read_cuts(layer, wired, model.config, arch),
            "arch": arch,
            "reader": reader,
            "bias": first,
        }
        given: dict[str, Any] = {}
        has_experts = any(is_experts(path, m, arch.num_experts) for path, m in layer.named_modules())
        if half == "attention":
            body = read_attention(layer, wired, groups=part, **known)
            given = {name: seen[i].given.get(there) for name, there in wired.attention_arguments}
        else:
            body = read_ffn(layer, wired, columns=part, **known)
            if plainly and has_experts and not add_experts(body, row_parallel(layer, known["cuts"])):
                raise unsplittable(wired.ffn[0], "experts and one projection beside them at most", "another form")
        for module in body.modules():
            if module in names:
                reader.read_buffers(module)
        with torch.inference_mode():
            out = body(seen[i].inputs[half], **given)
        found.append(out[0] if isinstance(out, tuple | list) else out)
    return found


def _halves_seen(probe: Probe, layout: Layouts) -> list[Passed]:
    """Run the probe once and note what goes through the halves of its layers."""
    found = [Passed({}, (), {}, {}) for _ in probe.layers]
    with _watching(probe.layers, [layout.of(i) for i in range(len(found))], found):
        probe.run()
    return found


def _coarser(arch: ModelArch, half: Half) -> ModelArch:
    """The same counts with one of the halves in one piece."""
    if half == "attention":
        return replace(arch, num_kv_heads=1, qk_norm_over_heads=False)
    return replace(arch, ffn_dim=1, num_experts=0, expert_columns=0)


def _whole(arch: ModelArch) -> ModelArch:
    coarse = _coarser(_coarser(arch, "attention"), "ffn")
    return replace(coarse, parallel_block=True, post_norm=False, whole_layers=True)


@contextmanager
def _watching(layers: nn.ModuleList, layouts: Sequence[LayerLayout], found: list[Passed]) -> Iterator[None]:
    def around(seen: Passed, names: tuple[str, ...]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.given = dict(zip(names, args[1:], strict=False)) | kwargs
            seen.shape = (args[0] if args else kwargs["hidden_states"]).shape

        return hook

    def entering(seen: Passed, half: Half) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            flat = x.numel() == math.prod(seen.shape)  # the batch is flattened by some; here it stays as it is
            seen.inputs[half] = x.clone().view(seen.shape if flat else x.shape)

        return hook

    def leaving(seen: Passed, half: Half) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, out: Any) -> None:
            seen.outputs[half] = (out[0] if isinstance(out, tuple | list) else out).clone()

        return hook

    handles = []
    for layer, layout, seen in zip(layers, layouts, found, strict=True):
        names = layer_arguments(layer)
        handles.append(layer.register_forward_pre_hook(around(seen, names), with_kwargs=True))
        ends: tuple[tuple[Half, str, str], ...] = (
            ("attention", layout.attention, layout.attention), ("ffn", layout.ffn[0], layout.ffn[-1]))  # fmt: skip
        for half, first, last in ends:
            entered = getattr(layer, first).register_forward_pre_hook(entering(seen, half), with_kwargs=True)
            handles += [entered, getattr(layer, last).register_forward_hook(leaving(seen, half))]
    with hooked(handles):
        yield


def _close(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and bool((a.reshape(-1) - b.reshape(-1)).abs().max() <= _TOLERANCE * b.abs().max())
