"""The probe: a small random model with one layer of each kind that a config has, and how its layers are wired.

It has fewer heads and rows and shorter windows where the config allows it; the self-test (runtime/selftest.py) splits
the same model. Reads no weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from splitray.errors import ModelError, unsplittable
from splitray.model.config import depth_of
from splitray.model.layer_kinds import FAILURES, layer_kinds, one_of_each, with_short_lengths
from splitray.model.layout import LayerLayout, Layouts, hooked, layer_arguments, observe_layer
from splitray.model.smaller import smaller
from splitray.model.surgery import decoder_of, layers_of

_VOCAB = 64


@dataclass(frozen=True, slots=True)
class Probe:
    """The model, and for each layer of the config that it was made for the layer of the same kind in it."""

    model: PreTrainedModel
    which: tuple[int, ...]

    @property
    def layers(self) -> nn.ModuleList:
        """Of the model's decoder."""
        return layers_of(self.model)

    def run(self, *, first: int = 3, use_cache: bool = False) -> object:
        """One forward over two short sequences, the first of them padded on the left."""
        ids = torch.arange(first, first + 8).reshape(2, 4)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask, use_cache=use_cache)


def probe_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a probe: random, float32, deterministic, small where that is allowed."""
    return make_probe(config).model


def make_probe(config: PretrainedConfig) -> Probe:
    """Choose the layers and draw the weights.

    Raises:
        ModelError: transformers makes no model of the config.
    """
    chosen, which = one_of_each(config, _VOCAB)
    small = with_short_lengths(chosen)
    wanted = _pattern(small)
    failure: Exception | None = None
    for candidate in smaller(small):
        try:
            probe = Probe(_random(candidate), which)
            if _pattern(candidate) == wanted:
                probe.run()
                return probe
        except FAILURES as error:
            failure = error
    said = "none" if failure is None else f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    expected = f"a config of {config.model_type} by which transformers runs a small model"
    raise ModelError("config.json", expected=expected, actual=said, remedy="correct it, or use another model")


def _random(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose every weight matters, so that a wrong sum shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name.rsplit(".", 2)[-2]:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.data.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
        kept = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model.eval()  # type: ignore[no-any-return]


def _pattern(config: PretrainedConfig) -> list[int]:
    """Which layers of a config are of one kind: for each layer the first one that is like it."""
    kinds = layer_kinds(config)
    return [kinds.index(kind) for kind in kinds]


def observe(probe: Probe) -> Layouts:
    """How the layers of a probe are wired; all of them are run whole if one of them is wired as none is known."""
    family = probe.model.config.model_type
    before, after = _around(probe)
    try:
        layouts = tuple(observe_layer(x, lambda: probe.run(use_cache=True), family=family) for x in probe.layers)
        if len({x.parallel for x in layouts}) > 1:
            raise unsplittable(f"the decoder layers of {family}", "halves one after the other, or both at once", "both")
    except (*FAILURES, ModelError):
        return whole(probe, before, after)
    return Layouts(different=layouts, which=probe.which, before=before, after=after)


def true_scales(layout: Layouts, probe: Probe, layers: nn.ModuleList) -> Layouts:
    """The wiring of a probe with the residual factors of the true model, which may depend on its depth.

    A factor is known by the setting of a layer that has its value; where there is none, layers are run whole.

    Args:
        layout: of the probe.
        probe: the small model.
        layers: of the true one, on the meta device.
    """
    found = list(layout.different)
    for i, (wired, small) in enumerate(zip(layout.different, probe.layers, strict=True)):
        if wired.residual_scale == 1.0 or i not in layout.which:
            continue
        names = [n for n, v in vars(small).items() if type(v) is float and abs(v / wired.residual_scale - 1) < 1e-3]
        values = {getattr(x, n) for x, which in zip(layers, layout.which, strict=True) if which == i for n in names}
        if len(values) != 1:
            return whole(probe, layout.before, layout.after)
        found[i] = replace(wired, residual_scale=values.pop())
    return replace(layout, different=tuple(found))


def whole(probe: Probe, before: tuple[str, ...], after: tuple[str, ...]) -> Layouts:
    """The wiring of a probe whose layers are run as they are.

    Raises:
        ModelError: not even that is possible, as something else than residuals goes from layer to layer.
    """
    family, outs, hidden = probe.model.config.model_type, [], probe.model.config.hidden_size

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        outs.append((args[0] if args else kwargs["hidden_states"], out))

    with hooked(layer.register_forward_hook(hook, with_kwargs=True) for layer in probe.layers):
        probe.run()
    for x, out in outs:
        first = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(first, Tensor) or first.shape != x.shape or x.shape[-3:] != (2, 4, hidden):
            found = f"{tuple(x.shape)} into a layer and {tuple(getattr(first, 'shape', ()))} out of it"
            expected = "residuals [batch, positions, hidden] from layer to layer"
            raise unsplittable(f"the decoder layers of {family}", expected, found)
    layouts = tuple(
        LayerLayout(whole=True, tuple_size=len(out) if isinstance(out, tuple | list) else 0) for _, out in outs
    )
    if len(layouts) != len(probe.layers):
        raise unsplittable(f"the decoder layers of {family}", "one call of each", f"{len(layouts)} calls")
    streams = outs[0][0].numel() // (2 * 4 * hidden)
    return Layouts(different=layouts, which=probe.which, before=before, after=after, streams=streams)


def reads_tokens(probe: Probe) -> bool:
    """Whether something besides the residual that layers get depends on which tokens are read."""
    return not _equal(*(_given(probe, first) for first in (3, 17)))


def _given(probe: Probe, first: int) -> list[object]:
    found: list[object] = []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = layer_arguments(layer)
        given = dict(zip(names, args[1:], strict=False)) | kwargs
        found.append({n: copy.copy(v) for n, v in given.items() if n != "hidden_states"})

    with hooked(layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in probe.layers):
        probe.run(first=first)
    return found


def _equal(a: object, b: object) -> bool:
    """Whether two values hold the same tensors; other things do not count."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_equal(a[k], b.get(k)) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return True


def _around(probe: Probe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the decoder's other children with weights: those that run before the layers, and those behind them."""
    decoder, layers_name = decoder_of(probe.model, depth_of(probe.model.config))
    children = {n: m for n, m in decoder.named_children() if n != layers_name and any(True for _ in m.parameters())}
    begun, late = list[bool](), set[str]()

    def called(name: str) -> Any:
        def hook(*_: object) -> None:
            if begun:
                late.add(name)

        return hook

    handles = (
        probe.layers[0].register_forward_pre_hook(lambda *_: begun.append(True)),
        *(m.register_forward_pre_hook(called(n)) for n, child in children.items() for m in child.modules()),
    )
    with hooked(handles):
        probe.run()
    return tuple(n for n in children if n not in late), tuple(n for n in children if n in late)
