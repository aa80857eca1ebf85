"""Experts in few bits: the same bits wherever they are, the numbers that are stored, and what they take."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import family_config
from gguf import GGMLQuantizationType as Kind
from gguf_files import small_model, write_gguf
from safetensors.torch import save_file
from splits import bytes_read_and_lent, moved_while_generating, slow_devices, split, threads_of
from stored_words import AWQ_ORDER, words
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from splitray.arch import Range, held_as
from splitray.errors import ModelError
from splitray.model.opened import Opened, open_checkpoint
from splitray.model.reading import read_arch, read_config
from splitray.model.slicing import Cut
from splitray.model.weights.quantised import quantise
from splitray.placement import LayerPlacement, Placement, Shares, weight_bytes
from splitray.profiling.faults import trials
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.hf import SplitModel
from splitray.runtime.launch import launch_engine, read_model
from splitray.runtime.sampling import Sampling
from splitray.topology import DeviceId, Topology
from splitray.weight_formats import FORMATS, as_format

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
GREEDY = Sampling(max_new_tokens=24)
DRAWN = Sampling(max_new_tokens=10, temperature=0.9, seed=11)
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = {**SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "intermediate_size": 64, "num_local_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {**SIZES, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": 6},
    "qwen2_moe": {**MOE, "intermediate_size": 96, "shared_expert_intermediate_size": 320, "decoder_sparse_step": 1},
    "qwen3_moe": {**MOE, "intermediate_size": 96, "mlp_only_layers": [0]},
    "deepseek_v3": {
        **SIZES, "head_dim": None, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "intermediate_size": 96, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
}  # fmt: skip


@cache
def model_of(family: str) -> PreTrainedModel:
    """Its experts differ and its router decides: every weight matters."""
    values = {k: v for k, v in FAMILIES[family].items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
        elif "norm" not in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.thin(10)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_has_the_same_bits_wherever_experts_are(family, weights, logits_of):
    runs: list[tuple[list[int], list[torch.Tensor]]] = []
    batch = Forward(session=99, ids=torch.tensor([PROMPT, PROMPT[::-1]]), position=0, keep=len(PROMPT), capacity=20)
    for devices, planner, seed in ((1, "even", 0), (2, "even", 0), *((3, "random", s) for s in range(4))):
        logits_of.clear()
        with split(model_of(family), devices=devices, planner=planner, seed=seed, weights=weights) as engine:
            tokens = list(engine.stream(PROMPT, DRAWN))
            several = (
                [engine.step(batch)] if family != "gpt_oss" else []
            )  # torch multiplies there what attends to sinks
            runs.append((tokens, list(logits_of) + several))
    first_tokens, first_logits = runs[0]
    assert len(set(first_tokens)) > 3
    for tokens, logits in runs[1:]:
        assert tokens == first_tokens
        assert all(torch.equal(a, b) for a, b in zip(logits, first_logits, strict=True))


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_rows_of_a_prompt_are_what_they_are_one_by_one(family, logits_of):
    with split(model_of(family), devices=2, weights="int4") as engine:
        tokens = list(engine.stream(PROMPT, DRAWN))
        one_by_one = list(logits_of)
        for read in (3, 7):
            logits_of.clear()
            list(engine.stream(PROMPT + tokens[:read], replace(DRAWN, max_new_tokens=1)))
            assert torch.equal(logits_of[0], one_by_one[read])


@pytest.mark.thin(10)
@pytest.mark.parametrize("sums", ["fixed", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_values_that_experts_were_rounded_to(family, sums):
    """Through the lean loop, and through transformers' own forward around held experts."""
    model = copy.deepcopy(model_of(family))
    kind, gates = as_format("int8"), ("router", ".gate.", "shared_expert_gate")
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(g in name for g in gates):
            continue
        turned = parameter.ndim == 3 and family == "gpt_oss"
        stack = (parameter.data if parameter.ndim == 3 else parameter.data[None]).transpose(-1, -2 if turned else -1)
        rounded = [quantise(w, bits=8, group=kind.group_of(w.shape[1])).values() for w in stack]
        found = torch.from_numpy(np.stack(rounded)).transpose(-1, -2 if turned else -1)
        parameter.data = (found if parameter.ndim == 3 else found[0]).contiguous()
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.inference_mode():
        expected = model(ids).logits
    lean = None if sums == "fixed" else False
    with split(model, devices=3, seed=2, weights="int8", sums=sums, lean=lean) as engine:
        for session, (given, wanted) in enumerate(((ids, expected), (ids[:1], expected[:1])), start=1):
            found = engine.step(Forward(session=session, ids=given, position=0, keep=len(PROMPT), capacity=20))
            assert near(found, wanted)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for what comes of activations in 8 bits, which now and then make a router choose another expert."""
    return float((found - wanted).abs().median()) < 0.05 * float(wanted.std())


@pytest.mark.thin(10)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_same_weights_in_float32(family, dtype):
    model = copy.deepcopy(model_of(family)).to(getattr(torch, dtype)).float()
    with split(model, devices=1) as engine:
        expected = list(engine.stream(PROMPT, GREEDY))
    for devices, planner, seed in ((2, "even", 0), (3, "random", 1)):
        with split(model, devices=devices, planner=planner, seed=seed, weights=dtype) as engine:
            assert list(engine.stream(PROMPT, GREEDY)) == expected
    with split(model, devices=2, weights=dtype, lean=False) as engine:
        assert list(engine.stream(PROMPT, GREEDY)) == expected


def test_placements_change_while_tokens_come_and_devices_die(monkeypatch, tmp_path):
    model = model_of("qwen2_moe")
    with split(model, devices=3, seed=1, weights="int4") as engine:
        still = list(engine.stream(PROMPT, GREEDY))
    with split(model, devices=3, seed=1, recovery=Recovery(store=str(tmp_path), every_tokens=4),
               weights="int4") as engine:  # fmt: skip
        run = trials(engine, threads_of(engine), prompt=PROMPT, sampling=GREEDY, count=2, seed=4)
    assert [t for t in run.trials if not t.identical] == [] and run.struck
    slow_devices(monkeypatch, 0.01)
    with split(model, devices=3, seed=1, recovery=Recovery(), weights="int4") as engine:
        tokens, moves = moved_while_generating(engine, PROMPT, GREEDY, range(2, 5))
    assert tokens == still and moves


@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_is_counted_is_what_devices_hold(family, weights, monkeypatch):
    for name, kind in FORMATS.items():  # what kernels keep beside numbers, scales and zeros is in no tensor
        zeros = kind.bits if kind.bits < 8 else 0
        bits = kind.bits + ((32 + zeros) / kind.group if kind.is_quantised else 0)
        monkeypatch.setitem(FORMATS, name, replace(kind, resident_bits=bits))
    arch = held_as(read_arch(model_of(family).config)[0], weights)
    shares = Shares.of({"edge0": [(0, 2)], "cloud0": [(2, arch.ffn_dim)]})
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, "cloud0"), shares)
    placement = Placement((layer,) * arch.num_layers, (DeviceId("edge0"),), Shares.whole(arch.vocab, "cloud0"))
    counted = weight_bytes(placement, arch)
    with split(model_of(family), weights=weights, placement=placement) as engine:
        found = {DeviceId(d): s["weight_bytes"] for d, s in engine.stats().items()}
    router = 4 * arch.num_layers * arch.hidden_dim * (arch.num_experts + 1)
    norms = 4 * arch.hidden_dim * (2 * arch.num_layers + 1)
    for device, held in found.items():
        shared = 0.06 * held if family == "qwen2_moe" else 0  # a shared expert is cut in sixteen parts
        assert counted[device] - shared <= held <= counted[device] + router + norms + 0.005 * held + shared
    assert sum(found.values()) < 0.6 * 4 * arch.num_params


@pytest.mark.full
def test_devices_hold_experts_in_formats_of_their_own():
    where = Topology.uniform(3)
    formats = zip(where.devices, ("int4", "float32", "bfloat16"), strict=True)
    where = replace(where, devices=tuple(replace(d, weights=w) for d, w in formats))
    with split(model_of("qwen2_moe"), topology=where, planner="even") as engine:
        assert len(list(engine.stream(PROMPT, GREEDY))) == GREEDY.max_new_tokens
        held = [s["weight_bytes"] for s in engine.stats().values()]
    assert 2 * held[0] < held[1] and 1.4 * held[2] < held[1]


def test_columns_beside_experts_are_cut_between_groups():
    arch = held_as(read_arch(model_of("qwen2_moe").config)[0], "int4")
    cut = Cut("columns", "in", (320,), arch.column_cuts(320))
    taken = [cut.ranges([Range(e, e + 1)], 6)[0] for e in range(6)]
    assert [r.start for r in taken[1:]] == [r.stop for r in taken[:-1]] and (taken[0].start, taken[-1].stop) == (0, 320)
    assert all(r.start % 32 == 0 for r in taken)
    assert cut.blocks([Range(taken[2].start, 320)], 6, ()) == [b for b in cut.blocks([Range(0, 320)], 6, ())
                                                               if b.start >= taken[2].start]  # fmt: skip


def test_a_sum_of_experts_that_is_not_simply_added_is_refused():
    """The experts of laguna count by a factor, behind their sum."""
    config = CONFIG_MAPPING["laguna"](**{**MOE, "intermediate_size": 96, "shared_expert_intermediate_size": 32,
                                         "moe_routed_scaling_factor": 2.5})  # fmt: skip
    arch, _ = read_arch(config)
    assert arch.num_experts == 6 and arch.experts_apart
    for weights in ("int4", "bfloat16"):
        with pytest.raises(ModelError, match="stacked experts of another form"):
            held_as(arch, weights)
    with pytest.raises(ModelError, match="heads of a multiple of 8 features, got 2"):  # one for the gate of each head
        held_as(replace(arch, experts_apart=False), "int4")
    assert not read_arch(family_config("mixtral"))[0].experts_apart
    whole, _ = read_arch(family_config("llama4_text"))  # nobody cuts its FFN, whose experts are stacked in another way
    assert whole.ffn_dim == 1 and whole.experts_apart


# --- what is stored in few bits ---


def save(folder: Path, family: str, method: dict[str, Any], pack: Callable[..., dict[str, torch.Tensor]]) -> None:
    """A model whose experts are stored by a method, the rest in bfloat16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model_of(family).state_dict().items():
        packed = pack(name, tensor)
        tensors |= packed or {name: tensor.bfloat16()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    config = model_of(family).config.to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}, default=str))


def mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {}
    experts, inputs, outputs = tensor.shape
    generator = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(121, 126, (experts, outputs, inputs // 32), generator=generator).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def one_by_one(method: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts as people have them: linears of their own."""
    if tensor.ndim < 3:
        return {}
    module, part = name.rsplit(".", 1)
    random, found = np.random.default_rng(tensor.numel()), {}
    for e, matrix in enumerate(tensor):
        halves = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)) if "gate" in part else {part: matrix}
        for which, weight in halves.items():
            key, (outputs, inputs) = f"{module}.{e}.{which}", weight.shape
            if method == "fp8":
                found[f"{key}.weight"] = (weight * 20).to(torch.float8_e4m3fn)
                found[f"{key}.weight_scale_inv"] = torch.rand(-(-outputs // 32), -(-inputs // 32)) / 20 + 0.01
                continue
            numbers = random.integers(0, 16, (outputs, inputs))
            zeros = random.integers(4, 12, (outputs, inputs // 32))
            scales = torch.from_numpy(random.uniform(0.01, 0.03, (outputs, inputs // 32))).half()
            awq = method == "awq"
            found[f"{key}.scales"] = scales.T
            found[f"{key}.qweight"] = words(numbers.T, 4, AWQ_ORDER) if awq else words(numbers, 4).T
            found[f"{key}.qzeros"] = words(zeros.T - (not awq), 4, AWQ_ORDER if awq else None)
            if method == "act-order":
                order = np.random.default_rng(len(part) if "down" in part else 1).permutation(inputs)
                found[f"{key}.g_idx"] = torch.from_numpy(np.arange(inputs)[order] // 32).int()
    return found


STORED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, "int8"),
    "awq": ("qwen3_moe", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int4"),
    "gptq": ("qwen3_moe", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "int4"),
    "act-order": ("qwen3_moe", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "int4"),
    "fp8": ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [32, 32]}, "int8"),
}


def saved(folder: Path, stored: str) -> Path:
    family, method, _ = STORED[stored]
    pack = mxfp4 if stored == "mxfp4" else lambda name, tensor: one_by_one(stored, name, tensor)
    save(folder, family, method, pack)
    return folder


def plain(source: Opened, path: Path) -> PreTrainedModel:
    """transformers' own model with the weights of a checkpoint as floats."""
    model = AutoModelForCausalLM.from_config(read_config(path), dtype=torch.float32)
    state = model.state_dict()
    for name, tensor in state.items():
        stacked = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        state[name] = (source.read_experts(name, range(len(tensor))) if stacked else source.read(name)).float()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("stored", ["mxfp4", "awq", "gptq", "act-order"])
def test_what_is_stored_of_an_expert_is_what_is_held(stored, tmp_path):
    source = open_checkpoint(saved(tmp_path, stored))
    assert not any("experts" in n for n in source.inexact()) and source.stored().resident_bits is not None
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        for expert in (0, 3):
            values = source.read_experts(name, [expert])[0]
            found = source.read_quantised_expert(name, expert)
            assert found is not None and found.bits == (8 if stored == "mxfp4" else 4)
            wanted = (values.t() if stored == "mxfp4" else values).float().numpy()
            np.testing.assert_allclose(found.values(), wanted, rtol=1e-6)


@pytest.mark.thin(5)
@pytest.mark.parametrize("stored", STORED)
def test_a_checkpoint_runs_as_its_experts_are_stored(stored, tmp_path):
    path, weights = saved(tmp_path, stored), STORED[stored][2]
    arch, _, _ = read_model(path)
    assert (arch.weights, arch.as_stored) == (weights, stored != "fp8")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted = plain(open_checkpoint(path), path)(ids).logits
    found = []
    for planner, seed in (("edge_only", 0), ("random", 1), ("random", 2)):
        with SplitModel.from_pretrained(path, topology=Topology.uniform(3), planner=planner, seed=seed,
                                        fleet=ThreadFleet()) as model:  # fmt: skip
            found.append(model(ids).logits)
    assert near(found[0], wanted)
    assert all(torch.equal(f, found[0]) for f in found[1:])


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.MXFP4], ids=lambda k: k.name)
def test_experts_of_gguf_are_held_as_they_are_stored(kind, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(small_model("gpt_oss"), path, kind=kind)
    source = open_checkpoint(path)
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        found = source.read_quantised_expert(name, 2)
        assert found is not None and found.bits == 8
        np.testing.assert_allclose(found.values(), source.read_experts(name, [2])[0].t().numpy(), rtol=1e-6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("stored", ["mxfp4", "gptq"])
def test_what_is_stored_crosses_to_a_device_without_the_model_as_it_is(stored, tmp_path):
    read, lent = bytes_read_and_lent(saved(tmp_path, stored), PROMPT, GREEDY)
    assert 0 < lent < 2.5 * read


@pytest.mark.full
def test_experts_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Never more than one beside what is held."""
    model_of("mixtral").to(torch.float32).save_pretrained(tmp_path)
    most, source = 0, open_checkpoint(tmp_path)
    read = source.read_experts

    def counted(name: str, experts: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, len(experts))
        return read(name, experts)

    monkeypatch.setattr(
        "splitray.model.source.Checkpoint.read_experts", lambda _, name, experts: counted(name, experts)
    )
    with launch_engine(model=tmp_path, devices=2, runtime="local", weights="int4") as engine:
        assert list(engine.stream(PROMPT, GREEDY))
    assert most == 1
