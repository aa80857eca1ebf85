"""Weights in few bits: what they round to, what their kernels compute, and that no placement changes a bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import family_config, family_model
from splits import another, moved_while_generating, slow_devices, split, threads_of

from splitray.arch import ModelArch, Range, held_as
from splitray.errors import InputError, ModelError
from splitray.fitted import fitted
from splitray.model.reading import read_arch
from splitray.model.weights.kernel import Kernel, rows_alike
from splitray.model.weights.quantised import Quantised, beside, joined, quantise
from splitray.model.weights.sums import on_grid
from splitray.placement import validate
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.profiling.faults import trials
from splitray.profiling.perplexity import PerplexityRequest
from splitray.profiling.perplexity import run as perplexity
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology
from splitray.weight_formats import FORMATS, NUM_BLOCKS, as_format

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
GREEDY = Sampling(max_new_tokens=32)
DRAWN = Sampling(max_new_tokens=12, temperature=0.9, seed=11)
KINDS = [(8, 32), (8, 16), (4, 32), (4, 128), (4, 16)]
QUANTISED = [name for name, kind in FORMATS.items() if kind.is_quantised]


def matrix(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("inputs", [512, 500])
def test_each_weight_is_within_half_a_step(bits, group, inputs):
    weight = matrix(24, inputs)
    weight[3] = 0
    weight[4, 32:64] = weight[4, 32]
    weight[5] = weight[5].abs() + 1  # far from zero, so that the zero of a group lies at its border
    values = torch.from_numpy(quantise(weight, bits=bits, group=group).values())
    assert values.shape == weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % group)).view(24, -1, group)
    least, most = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    step = (most - least) / 15 if bits == 4 else padded.abs().amax(-1) / 127
    # the zero of a group is a whole number, and its scale the best one for the numbers chosen: half a step more each
    room = (1.5 if bits == 4 else 1.0) * step.repeat_interleave(group, dim=1)[:, :inputs]
    assert bool(((values - weight).abs() <= room + 1e-7).all())
    assert bool((values[3] == 0).all())


@pytest.mark.parametrize(("bits", "most"), [(8, 4e-5), (4, 7e-3)])
def test_the_error_is_that_of_the_best_roundings_of_such_bits(bits, most):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    values = torch.from_numpy(quantise(weight, bits=bits, group=32).values())
    assert float(((values - weight) ** 2).sum() / (weight**2).sum()) < most


def test_what_is_not_finite_is_seen():
    weight = matrix(8, 64)
    weight[1, 3], weight[2, 5] = float("nan"), float("inf")
    for bits in (4, 8):
        values = quantise(weight, bits=bits, group=32).values()
        assert not np.isfinite(values[1, :32]).all() and not np.isfinite(values[2, :32]).all()
        assert np.isfinite(values[[0, *range(3, 8)]]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_types_of_a_checkpoint_are_rounded_alike(bits):
    weight = matrix(16, 128).bfloat16()
    one, other = quantise(weight, bits=bits, group=32), quantise(weight.float(), bits=bits, group=32)
    assert np.array_equal(one.numbers, other.numbers) and np.array_equal(one.scales, other.scales)


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_parts_are_put_together(bits, group):
    whole = quantise(matrix(32, 4 * group + 8), bits=bits, group=group)
    rows = [whole.taken([Range(0, 8)]), whole.taken([Range(8, 16), Range(16, 32)])]
    assert np.array_equal(joined(rows).values(), whole.values())
    halves = [quantise(matrix(32, 2 * group, seed), bits=bits, group=group) for seed in (1, 2)]
    both = beside(halves)
    assert np.array_equal(both.values(), np.concatenate([h.values() for h in halves], axis=1))


def close(found: np.ndarray, part: Quantised, x: np.ndarray) -> bool:
    """Whether a product is that of the values, but for the rounding of activations to 8 bits (half a percent)."""
    expected = x @ part.values().T
    return bool(np.abs(found - expected).max() <= 0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_kernel_multiplies_and_rows_are_what_they_are_alone(bits, group):
    x = np.random.default_rng(0).standard_normal((37, 3 * group + 8), dtype=np.float32)
    parts = [quantise(matrix(40, n, seed), bits=bits, group=group) for seed, n in enumerate((group, 2 * group, 8))]
    kernel, at, ys = Kernel(parts), 0, []
    found = kernel(x)
    for part, block in zip(parts, found, strict=True):
        ys.append(Kernel([part])(np.ascontiguousarray(x[:, at : at + part.inputs])))
        assert np.array_equal(block, ys[-1]), "a block is multiplied as it is alone"
        assert close(block, part, x[:, at : at + part.inputs])
        at += part.inputs
    for i in range(len(x)):
        assert np.array_equal(kernel(x[i : i + 1])[:, 0], found[:, i])
    some = Kernel([parts[1].taken([Range(8, 16), Range(24, 40)])])(np.ascontiguousarray(x[:, group : 3 * group]))
    assert np.array_equal(some, ys[1][:, [*range(8, 16), *range(24, 40)]]), "rows cut at multiples of eight"
    assert isinstance(rows_alike(bits, group), bool)


def test_numbers_on_the_grid_add_up_in_any_order():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 500)) * 10.0 ** rng.integers(-12, 5, (40, 500))).astype(np.float32)
    lifted = on_grid(x)
    assert np.abs(lifted - x).max() <= 2.0**-33 + 2.0**-40
    sums = [lifted[rng.permutation(40)].sum(0) for _ in range(20)]
    sums += [lifted[:7].sum(0) + (lifted[7:20].sum(0) + lifted[20:].sum(0))]
    assert all(np.array_equal(s, sums[0]) for s in sums)
    assert np.isnan(on_grid(np.array([np.nan], np.float32))).all() and np.isinf(on_grid(np.array([np.inf]))).all()


@pytest.mark.parametrize("columns", [40, 100, 512, 1000, 8192, 11008, 13824, 14336, 18944])
@pytest.mark.parametrize("weights", QUANTISED)
def test_columns_are_cut_between_groups_in_sixteen_parts(weights, columns):
    kind = as_format(weights)
    cuts = kind.ffn_cuts(columns)
    assert cuts[0] == 0 and cuts[-1] == columns and list(cuts) == sorted(set(cuts))
    assert all(c % kind.group_of(columns) == 0 for c in cuts[:-1])
    assert len(cuts) == min(NUM_BLOCKS, -(-columns // kind.group_of(columns))) + 1


def quantised_arch(name: str, weights: str) -> ModelArch:
    arch, _ = read_arch(family_config(name))
    return held_as(arch, weights, sums="fixed", lean=True)


@pytest.mark.parametrize("weights", QUANTISED)
def test_every_planner_cuts_where_the_format_allows_it(weights):
    arch, where = quantised_arch("llama", weights), Topology.uniform(3)
    plain = replace(arch, weights="float32")
    for seed in range(40):
        state = ClusterState(arch=arch, topology=where)
        validate(make_planner("random", seed=seed).propose(state), arch, where)
        free = make_planner("random", seed=seed).propose(ClusterState(arch=plain, topology=where))
        moved = fitted(free, arch)
        validate(moved, arch, where)
        assert fitted(moved, arch) == moved
    for name in ("even", "proportional", "layer_dp", "drift_plus_penalty", "exact", "myopic", "tensor_parallel"):
        validate(make_planner(name).propose(ClusterState(arch=arch, topology=where)), arch, where)


def test_a_cut_inside_a_group_is_refused():
    arch, where = quantised_arch("llama", "int4"), Topology.uniform(2)
    placement = make_planner("even").propose(ClusterState(arch=replace(arch, weights="float32"), topology=where))
    with pytest.raises(InputError, match="columns cut at|rows cut at"):
        validate(placement, arch, where)


def test_what_cannot_be_held_in_few_bits_is_refused():
    for wrong, meant in (("int3", "int"), ("INT8", "int8"), ("bests", "best"), ("Auto", "auto")):
        with pytest.raises(InputError, match=f"one of auto, .*best.*mean {meant}"):
            as_format(wrong)
    arch, _ = read_arch(family_config("mixtral"))
    with pytest.raises(ModelError, match="stacked experts"):
        held_as(replace(arch, experts_apart=True), "int4", sums="fixed", lean=True)
    arch, _ = read_arch(family_config("llama"))
    with pytest.raises(ModelError, match="--sums fast"):
        held_as(arch, "int4", sums="fixed", lean=False)
    for name in ("olmo2", "gemma2"):  # heads of ten features there
        arch, _ = read_arch(family_config(name))
        with pytest.raises(ModelError, match="--sums fast"):
            held_as(arch, "int4", sums="fixed", lean=True)
        assert not held_as(arch, "int4", sums="fast", lean=True).sums_in_blocks
    with pytest.raises(InputError, match="--dtype"):
        held_as(replace(arch, dtype="bfloat16"), "int4", sums="fixed", lean=True)


FAMILY = ["llama", "gpt2", "qwen2", "mistral", "phi3", "gpt_neox", "granite", "opt", "falcon"]


@pytest.mark.thin(9)
@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("family", FAMILY)
def test_every_logit_has_the_same_bits_wherever_the_pieces_are(family, weights, logits_of):
    model = family_model(family)
    runs: list[tuple[list[int], list[torch.Tensor]]] = []
    for devices, planner, seed in ((1, "even", 0), (2, "even", 0), *((3, "random", s) for s in range(4))):
        logits_of.clear()
        with split(model, devices=devices, planner=planner, seed=seed, weights=weights) as engine:
            runs.append((list(engine.stream(PROMPT, DRAWN)), list(logits_of)))
    first_tokens, first_logits = runs[0]
    for tokens, logits in runs[1:]:
        assert tokens == first_tokens
        assert all(torch.equal(a, b) for a, b in zip(logits, first_logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_rows_of_a_prompt_are_what_they_are_one_by_one(family):
    model = family_model(family)
    with split(model, devices=2, weights="int4") as engine:
        new = list(engine.stream(PROMPT, GREEDY))
        longer = PROMPT + new[:20]
        assert list(engine.stream(longer, Sampling(max_new_tokens=12))) == new[20:]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_the_values_that_the_weights_were_rounded_to(family, logits_of):
    model = copy.deepcopy(family_model(family))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            kind = as_format("int8")
            inputs = module.weight.shape[1]
            rounded = quantise(module.weight.detach(), bits=8, group=kind.group_of(inputs)).values()
            module.weight = torch.nn.Parameter(torch.from_numpy(rounded.copy()))
    with split(model, devices=2, weights="int8") as engine:
        list(engine.stream(PROMPT, Sampling(max_new_tokens=1, temperature=1.0)))
    found = logits_of[0][0]
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.03, "activations are rounded to 8 bits"


@pytest.mark.parametrize(("family", "weights"), [("llama", "int4"), ("gpt2", "int8")])
def test_placements_change_while_tokens_come(family, weights, monkeypatch):
    model = family_model(family)
    with split(model, devices=3, seed=1, weights=weights) as engine:
        still = list(engine.stream(PROMPT, GREEDY))
    slow_devices(monkeypatch, 0.01)
    with split(model, devices=3, seed=1, recovery=Recovery(), weights=weights) as engine:
        tokens, moves = moved_while_generating(engine, PROMPT, GREEDY, range(2, 6))
        assert another(engine, 9).layers, "placements of the format"
    assert tokens == still and len(moves) >= 2


@pytest.mark.thin(2)
@pytest.mark.parametrize(("family", "weights"), [("llama", "int4"), ("gpt2", "int8")])
def test_devices_die(family, weights, tmp_path):
    recovery = Recovery(store=str(tmp_path), every_tokens=4)
    with split(family_model(family), devices=3, seed=1, recovery=recovery, weights=weights) as engine:
        run = trials(engine, threads_of(engine), prompt=PROMPT, sampling=GREEDY, count=10, seed=4)
    assert len(run.trials) == 10 and run.hangs == 0 and run.leaks == 0
    assert [t for t in run.trials if not t.identical] == []
    assert len(run.struck) >= 5


@pytest.mark.thin(3)
@pytest.mark.parametrize("weights", QUANTISED)
def test_the_shipped_model_says_words(weights):
    """Four bits in groups of 128 are coarse for so small a model; it writes English all the same."""
    texts = []
    for devices in (1, 2):
        with launch_engine(model="tiny", devices=devices, runtime="local", weights=weights) as engine:
            ids = engine.tokenizer("Return a", add_special_tokens=False)["input_ids"]
            texts.append(engine.tokenizer.decode(list(engine.stream(ids, Sampling(max_new_tokens=24)))))
            held = sum(s["weight_bytes"] for s in engine.stats().values())
            assert held < 0.5 * 4 * engine.arch.num_params
    assert texts[0] == texts[1]
    assert sum(w in texts[0] for w in (" the", " of", " list", " a ")) >= 2, texts[0]


def test_noise_changes_quantised_weights_no_more_than_others():
    asked = PerplexityRequest(model="tiny", text="LICENSE", tokens=100, window=64, cut=5, channel="loss:0.1", masks=1)
    found, plain = (perplexity(replace(asked, weights=w))["perplexity"] for w in ("int8", "float32"))
    assert found / plain == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("cut", [None, 5])
def test_perplexity_in_a_format_is_that_of_any_placement(cut):
    asked = PerplexityRequest(model="tiny", text="LICENSE", tokens=140, window=64, weights="int8", cut=cut)
    found = perplexity(asked)
    plain = perplexity(replace(asked, weights=None, cut=None))
    assert (found["weights"], plain["weights"]) == ("int8", "float32")
    assert found["perplexity"] == perplexity(replace(asked, cut=None))["perplexity"]
    assert found["perplexity"] / plain["perplexity"] == pytest.approx(1, abs=0.02)
