"""Refuses an architecture that does not come out exact: a two-layer random model of its config, split against whole.

Runs once per config before a model is loaded, on threads of the caller, through the real wire.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch, Range
from splitray.errors import unsplittable
from splitray.model.layout import LayerLayout
from splitray.model.lengths import check_generation
from splitray.model.reading import StateDictSource, probe_model, read_arch
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.fleet import ThreadFleet
from splitray.topology import Topology

_PROMPT_TOKENS, _NEW_TOKENS = 7, 4
_TOLERANCE = 2e-4  # of the largest logit: float32 sums in another order, two layers deep
_passed: dict[str, bool] = {}


def self_test(config: PretrainedConfig) -> bool:
    """Split a small random model of this config three ways and compare it with the whole one.

    Returns:
        Whether the lean decode loop is exact too; if not, HF's own layer code is used throughout.

    Raises:
        ModelError: the split model's logits differ.
    """
    key = config.to_json_string()
    if key not in _passed:
        probe = probe_model(config)
        check_generation(type(probe), config)
        arch, layout = read_arch(probe.config)
        problem = _difference(probe, arch, layout, lean=False)
        if problem > _TOLERANCE:
            expected = f"split logits within {_TOLERANCE:g} of the unsplit model's"
            raise unsplittable(
                f"architecture {config.model_type}", expected, f"a difference of {problem:.2g} in the self-test"
            )
        _passed[key] = _difference(probe, arch, layout, lean=True) <= _TOLERANCE
    return _passed[key]


def _difference(probe: PreTrainedModel, arch: ModelArch, layout: LayerLayout, *, lean: bool) -> float:
    topology = Topology.uniform(3)
    fleet = ThreadFleet(source=StateDictSource(probe))
    batch = 1 if lean else 2  # the lean loop is for one sequence
    ids = torch.arange(1, 1 + batch * (_PROMPT_TOKENS + _NEW_TOKENS)).reshape(batch, -1) % arch.vocab
    with torch.inference_mode():
        whole = probe(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    parts = []
    with Engine(fleet=fleet, model_path="", arch=arch, layout=layout, topology=topology,
                placement=_uneven(arch, topology), lean=lean) as engine:  # fmt: skip
        if lean and not all(s["lean"] for s in engine.stats().values()):
            return float("inf")  # one loop for all devices, or some would run untested code
        for at, stop in [(0, _PROMPT_TOKENS), *((p, p + 1) for p in range(_PROMPT_TOKENS, ids.shape[1]))]:
            parts.append(
                engine.step(Forward(session=1, ids=ids[:, at:stop], position=at, keep=stop - at, capacity=ids.shape[1]))
            )
    difference = (torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _uneven(arch: ModelArch, topology: Topology) -> Placement:
    """Three devices, shares of different sizes, ranges apart, one device without heads in layer 0."""
    a, b, c = topology.ids

    def spread(total: int, devices: tuple[str, ...]) -> Shares:
        cuts = sorted({0, total, *(max(1, total * f // 7) for f in (1, 3, 6))} & set(range(total + 1)))
        shares: dict[str, list[Range]] = {}
        for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            shares.setdefault(devices[i % len(devices)], []).append(Range(start, stop))
        return Shares.of(shares)

    def layer(i: int) -> LayerPlacement:
        order = (b, c) if i == 0 else (c, a, b)
        if arch.parallel_block or i == 0:
            return LayerPlacement(spread(arch.num_kv_heads, order), spread(arch.ffn_dim, (a, b, c)))
        return LayerPlacement(Shares.whole(arch.num_kv_heads, a, c), spread(arch.ffn_dim, order))

    layers = tuple(layer(i) for i in range(arch.num_layers))
    return Placement(layers, (a,), spread(arch.vocab, (b, c)))
