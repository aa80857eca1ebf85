"""Refuses an architecture that does not come out exact: a small random model of its config, split against whole.

Runs once per config before a model is loaded, on threads of the caller, through the real wire.
"""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch, Range
from splitray.errors import DeviceLost, ModelError, unsplittable
from splitray.fitted import fitted
from splitray.model.layer_kinds import FAILURES
from splitray.model.layout import Layouts
from splitray.model.lengths import check_generation, length_rule
from splitray.model.probe import probe_model
from splitray.model.reading import read_arch
from splitray.model.state_dict_source import StateDictSource
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

_PIECES = (12, 5, 1, 1, 1, 1, 1, 1, 1)
"""Tokens of each forward: past the windows at once, past the borders of ropes one by one."""
_GROWING = (18, 8)
"""Tokens of a prompt and behind it: past the borders while the devices generate among themselves."""
_TOLERANCE = 2e-4  # of the largest logit: float32 sums in another order, some layers deep
_LONG_PIECES = (37, 20, 1, 1, 1)
_passed: dict[str, bool] = {}


def self_test(config: PretrainedConfig) -> bool:
    """Split a small random model of this config unevenly and compare it with the whole one.

    It has a layer of each kind, and what it reads crosses the windows and the borders that the config has.

    Returns:
        Whether the lean decode loop is exact too; if not, HF's own layer code is used throughout.

    Raises:
        ModelError: the split model's logits or tokens differ, or it does not run.
    """
    key = config.to_json_string()
    if key not in _passed:
        what = f"architecture {config.model_type}"
        try:
            check_generation(AutoModelForCausalLM._model_mapping[type(config)], config)
            probe = _steady(config)
            arch, layout = read_arch(probe.config)
            problem = max(_difference(probe, arch, layout, lean=False, cut=cut) for cut in (0, 1))
            lean = problem <= _TOLERANCE and _lean_is_exact(probe, arch, layout)
        except (ModelError, DeviceLost):  # the latter says nothing about the model
            raise
        except FAILURES as error:
            last = str(error).strip().split("\n")[-1]
            raise unsplittable(
                what, "a small model of its kind that runs", f"{type(error).__name__}: {last}"
            ) from error
        if problem > _TOLERANCE:
            expected = f"split logits within {_TOLERANCE:g} of the unsplit model's"
            raise unsplittable(what, expected, f"a difference of {problem:.2g} in the self-test")
        _passed[key] = lean
    return _passed[key]


def _lean_is_exact(probe: PreTrainedModel, arch: ModelArch, layout: Layouts) -> bool:
    """Whether it is, and runs at all."""
    try:
        return all(_difference(probe, arch, layout, lean=True, cut=cut) <= _TOLERANCE for cut in (0, 1))
    except FAILURES as error:
        if isinstance(error, DeviceLost):
            raise
        return False


def _difference(probe: PreTrainedModel, arch: ModelArch, layout: Layouts, *, lean: bool, cut: int) -> float:
    topology = Topology.uniform(3)
    fleet = ThreadFleet(source=StateDictSource(probe))
    batch, tokens = 1 if lean else 2, sum(_PIECES)  # the lean loop is for one sequence
    ids = torch.arange(1, 1 + batch * tokens).reshape(batch, -1) % arch.vocab
    at, parts = 0, []
    with Engine(fleet=fleet, model_path="", arch=arch, layout=layout, topology=topology,
                placement=_uneven(arch, topology, cut), lean=lean) as engine:  # fmt: skip
        if lean and not all(s["lean"] for s in engine.stats().values()):
            return float("inf")  # one loop for all devices, or some would run untested code
        for count in _PIECES:
            piece, stop = ids[:, at : at + count], at + count
            parts.append(engine.step(Forward(session=1, ids=piece, position=at, keep=count, capacity=tokens)))
            at = stop
        engine.forget(1)
        if length_rule(probe.config).borders and not _same_tokens(probe, engine, ids[:1, : _GROWING[0]]):
            return float("inf")
    return _apart(torch.cat(parts, dim=1), _in_pieces(probe, ids))


def _steady(config: PretrainedConfig) -> PreTrainedModel:
    """A probe, after a look whether such models give the same for a prompt at once and in pieces.

    They are read in chunks, and again after a fault. Where a rope changes with the length, the pieces are what counts.

    Raises:
        ModelError: they do not.
    """
    probe = probe_model(config)
    if length_rule(probe.config).changes:
        return probe
    ids = torch.arange(1, 1 + 2 * sum(_LONG_PIECES)).reshape(2, -1) % probe.config.vocab_size
    with torch.inference_mode():
        apart = _apart(_in_pieces(probe, ids, _LONG_PIECES), probe(input_ids=ids, use_cache=False).logits)
    if apart > _TOLERANCE:
        expected = "the same logits for a prompt at once and in pieces"
        actual = f"a difference of {apart:.2g} in transformers"
        raise unsplittable(f"architecture {config.model_type}", expected, actual)
    return probe


def _in_pieces(probe: PreTrainedModel, ids: torch.Tensor, pieces: tuple[int, ...] = _PIECES) -> torch.Tensor:
    """Logits of a whole model that reads its prompt as the split one does."""
    at, logits, cache = 0, [], DynamicCache(config=probe.config)
    with torch.inference_mode():
        for count in pieces:
            stop = at + count
            places, seen = torch.arange(at, stop).expand(len(ids), -1), torch.ones_like(ids[:, :stop])
            out = probe(input_ids=ids[:, at:stop], position_ids=places, attention_mask=seen, past_key_values=cache)
            logits.append(out.logits)
            at = stop
    return torch.cat(logits, dim=1)


def _apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    difference = (logits - expected).abs().max() / expected.abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _same_tokens(probe: PreTrainedModel, engine: Engine, ids: torch.Tensor) -> bool:
    """Whether the devices among themselves generate what transformers does, across the borders of its rope."""
    new = min(_GROWING[1], engine.arch.context_tokens - ids.shape[1])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = list(engine.stream(ids[0].tolist(), Sampling(max_new_tokens=new)))
    expected = probe.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)  # type: ignore[operator]
    return bool(expected[0, ids.shape[1] :].tolist() == found)


def _uneven(arch: ModelArch, topology: Topology, cut: int) -> Placement:
    """Three devices, shares of different sizes, ranges apart; the heads of every other layer, from `cut` on, on two.

    With a `cut` of 1 some layers have no part of their FFN on one of the three.
    """
    a, b, c = topology.ids

    def spread(total: int, devices: tuple[str, ...]) -> Shares:
        cuts = sorted({0, total, *(max(1, total * f // 7) for f in (1, 3, 6))} & set(range(total + 1)))
        shares: dict[str, list[Range]] = {}
        for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            shares.setdefault(devices[i % len(devices)], []).append(Range(start, stop))
        return Shares.of(shares)

    def layer(i: int) -> LayerPlacement:
        order = (b, c) if i % 2 == cut else (c, a, b)[: 3 - cut]
        if arch.parallel_block or i % 2 == cut:
            return LayerPlacement(spread(arch.num_kv_heads, order), spread(arch.ffn_dim, (a, b, c)))
        return LayerPlacement(Shares.whole(arch.num_kv_heads, a, c), spread(arch.ffn_dim, order))

    layers = tuple(layer(i) for i in range(arch.num_layers))
    return fitted(Placement(layers, (a,), spread(arch.vocab, (b, c))), arch)
