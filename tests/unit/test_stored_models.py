"""Models whose weights are stored in few bits, run as they are stored: GGUF, GPTQ, AWQ, compressed-tensors, fp8."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import HALVES, MODELS, small_model, tokenizer_metadata, write_gguf
from safetensors.torch import save_file
from splits import bytes_read_and_lent
from stored_words import AWQ_ORDER, words
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from splitray.errors import InputError, ModelError
from splitray.model.checked import check_weights
from splitray.model.opened import open_checkpoint
from splitray.model.reading import read_config
from splitray.model.token_ids import end_ids
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.hf import SplitModel
from splitray.runtime.launch import SHIPPED, launch_engine, needed_tokenizer, read_model
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT = [3, 5, 7, 11, 13, 17, 19, 23]
GREEDY = Sampling(max_new_tokens=12)
WIDE: dict[str, object] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def model_of(path: Path) -> PreTrainedModel:
    """transformers' own model with the weights of a checkpoint as floats."""
    source = open_checkpoint(path)
    model = (
        LlamaForCausalLM(read_config(path)) if path.is_dir() else AutoModelForCausalLM.from_config(read_config(path))
    )
    model.load_state_dict({name: source.read(name).float() for name in model.state_dict()})
    return model.float().eval()


def split_logits(path: Path, planner: str = "even", seed: int = 0, **options: Any) -> torch.Tensor:
    where = Topology.uniform(3)
    with SplitModel.from_pretrained(path, topology=where, planner=planner, seed=seed, fleet=ThreadFleet(),
                                    **options) as model:  # fmt: skip
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits
        return logits


def check(path: Path, weights: str, *, apart: float = 0.1) -> None:
    """In float32 transformers' logits; as stored near them, and the same bits over any placement."""
    with torch.no_grad():
        wanted = model_of(path)(torch.tensor([PROMPT])).logits
    torch.testing.assert_close(split_logits(path, weights="float32"), wanted, rtol=1e-4, atol=1e-4)
    arch, _, _ = read_model(path)
    assert arch.as_stored and arch.weights == weights
    whole = split_logits(path, "edge_only")
    assert float((whole - wanted).abs().max()) < apart * float(wanted.std())
    for seed in range(4):
        assert torch.equal(split_logits(path, "random", seed), whole), seed


@pytest.mark.thin(5)
@pytest.mark.parametrize("kind", [*HALVES, Kind.Q4_0, Kind.Q5_1, Kind.Q8_0], ids=lambda k: k.name)
def test_a_gguf_file_runs_as_it_is_stored(tmp_path, kind):
    path = tmp_path / "m.gguf"
    write_gguf(small_model("llama", **WIDE), path, kind=kind)
    four = kind in (Kind.Q4_0, Kind.Q4_K, Kind.Q2_K, Kind.Q3_K)
    check(path, "int4" if four else "int8")


@pytest.mark.thin(5)
@pytest.mark.parametrize("family", MODELS)
def test_families_of_gguf_run_as_they_are_stored(tmp_path, family):
    write_gguf(small_model(family), tmp_path / "m.gguf", kind=Kind.Q4_1)
    check(tmp_path / "m.gguf", "int4", apart=0.3)


def test_attention_that_one_position_takes_whole_turns_by_positions_all_the_same(tmp_path):
    """So large are scores that a probe of two positions gives the same with any angles."""
    model = small_model("llama", **WIDE)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 30
    write_gguf(model, tmp_path / "m.gguf", kind=Kind.F32)
    for seed in range(3):
        with SplitModel.from_pretrained(tmp_path, topology=Topology.uniform(3), planner="random", seed=seed,
                                        fleet=ThreadFleet()) as split:  # fmt: skip
            ids = split.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
        assert ids.tolist() == model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False).tolist()


CONFIG = LlamaConfig(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
                     num_hidden_layers=2, vocab_size=96, max_position_embeddings=128)  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq"},
    "act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "compressed": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [64, 64]},
}  # fmt: skip


def save_quantised(folder: Path, method: str, left_plain: str = "none") -> None:
    """A llama whose linears are stored by a method, but for one, the rest in bfloat16."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    said, tensors = METHODS[method], dict[str, torch.Tensor]()
    for name, tensor in LlamaForCausalLM(CONFIG).state_dict().items():
        if not name.endswith("proj.weight") or left_plain in name:
            tensors[name] = tensor.bfloat16()
            continue
        module, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
        if method == "fp8":
            tensors[name] = (tensor * 20).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(-(-outputs // 64), -(-inputs // 64)) / 20
            continue
        if method == "compressed":
            tensors[name] = torch.from_numpy(random.integers(-128, 128, (outputs, inputs))).to(torch.int8)
            tensors[f"{name}_scale"] = torch.rand(outputs, 1).bfloat16() / 2000
            continue
        bits, size = said["bits"], said["group_size"]
        groups = 1 if size == -1 else inputs // size
        numbers = random.integers(0, 1 << bits, (outputs, inputs))
        zeros = random.integers(1 << bits - 2, 3 << bits - 2, (outputs, groups))
        scales = torch.rand(outputs, groups).half().T * (0.02 if bits == 4 else 0.001)
        order = AWQ_ORDER if method == "awq" else None
        tensors[f"{module}.scales"] = scales.contiguous()
        tensors[f"{module}.qweight"] = words(numbers.T, 4, AWQ_ORDER) if order else words(numbers, bits).T.contiguous()
        tensors[f"{module}.qzeros"] = words(zeros.T - (not order), bits, order).contiguous()
        if method == "act-order":
            index = torch.from_numpy(random.permutation(np.arange(inputs) // size))
            tensors[f"{module}.g_idx"] = index.int()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": said}))


@pytest.mark.thin(2)
@pytest.mark.parametrize(("method", "weights"), [("gptq", "int4"), ("act-order", "int4"), ("gptq8", "int8"),
                                                 ("awq", "int4/128"), ("compressed", "int8")])  # fmt: skip
def test_a_quantised_checkpoint_runs_as_it_is_stored(tmp_path, caplog, method, weights):
    save_quantised(tmp_path, method)
    check(tmp_path, weights)
    inexact = [n for n in open_checkpoint(tmp_path).inexact() if "o_proj" in n]
    assert len(inexact) == (2 if method == "act-order" else 0)
    assert ("rounded to 8 bits" in caplog.text) == (method == "act-order")


@pytest.mark.parametrize("stored", ["gptq", "gguf"])
def test_a_matrix_that_was_left_plain_is_said_to_be_rounded(tmp_path, caplog, stored):
    plain, path = "model.layers.1.mlp.down_proj", tmp_path
    if stored == "gptq":
        save_quantised(tmp_path, stored, left_plain=plain)
    else:
        path = tmp_path / "m.gguf"
        write_gguf(small_model("llama", **WIDE), path, kind=Kind.Q4_K, left_plain="blk.1.ffn_down.weight")
    arch, _, _ = read_model(path)
    assert arch.weights == "int4" and arch.as_stored
    assert open_checkpoint(path).inexact() == [f"{plain}.weight"]
    assert "1 matrix" in caplog.text and "rounded to 8 bits" in caplog.text and plain in caplog.text


def test_8_bit_floats_are_rounded_to_whole_numbers_and_it_is_said_by_how_much(tmp_path, caplog):
    save_quantised(tmp_path, "fp8")
    with torch.no_grad():
        wanted = model_of(tmp_path)(torch.tensor([PROMPT])).logits
    torch.testing.assert_close(split_logits(tmp_path, weights="float32"), wanted, rtol=1e-4, atol=1e-4)
    arch, _, _ = read_model(tmp_path)
    assert arch.weights == "int8" and not arch.as_stored
    found = split_logits(tmp_path)
    assert float((found - wanted).abs().max()) < 0.1 * float(wanted.std())
    assert "14 matrices" in caplog.text and "rounded to 8 bits" in caplog.text


@pytest.mark.parametrize("stored", ["gguf", "awq", "act-order"])
def test_what_is_stored_crosses_to_a_device_without_the_model_as_it_is(tmp_path, stored):
    path = tmp_path
    if stored == "gguf":
        path = tmp_path / "m.gguf"
        write_gguf(small_model("llama", **WIDE), path, kind=Kind.Q4_K)
    else:
        save_quantised(tmp_path, stored)
    read, lent = bytes_read_and_lent(path, PROMPT, GREEDY)
    assert 0 < lent < 2 * read


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", None])
def test_other_methods_are_refused_by_name(tmp_path, method):
    save_quantised(tmp_path, "gptq")
    said = {**METHODS["gptq"], "quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": said}))
    with pytest.raises(ModelError, match=method or "quant_method"):
        read_model(tmp_path)


def test_a_config_of_its_own_is_named_where_it_must_be_put(tmp_path):
    """As GPTQ's first tools wrote it, which transformers does not read either."""
    save_quantised(tmp_path, "gptq")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(ModelError, match=r"add what quantize_config\.json says to config\.json"):
        check_weights(tmp_path)


@pytest.mark.parametrize("size", [100, 40_000])
def test_a_gguf_file_that_ends_early_is_refused(tmp_path, size):
    path = tmp_path / "m.gguf"
    write_gguf(small_model("llama", **WIDE), path, kind=Kind.Q4_0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="bytes"):
        read_model(path)


def test_a_gguf_file_of_another_model_than_it_says_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(small_model("llama"), path, more={"llama.feed_forward_length": 64})
    with pytest.raises(ModelError, match=r"shape \[64, 64\] by config.json.*\[96, 64\]"):
        read_model(path)


def test_a_damaged_header_of_a_gguf_file_is_refused_or_read(tmp_path):
    """Bytes changed anywhere in metadata and table: nothing but a refusal may come of it."""
    path, random = tmp_path / "m.gguf", np.random.default_rng(0)
    write_gguf(small_model("llama"), path, kind=Kind.Q4_0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in random.integers(4, 3000, 4):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            check_weights(path)
        except InputError:
            refused += 1
    assert refused > 20


def test_a_folder_may_be_named_like_a_file(tmp_path):
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model(folder)
    write_gguf(small_model("llama"), folder / "m.gguf", kind=Kind.Q4_0)
    assert read_model(folder)[0].weights == "int4"


def test_the_shipped_model_as_a_gguf_file_is_the_shipped_model(tmp_path):
    """Tokenizer, template, ends and tokens."""
    path = tmp_path / "tiny.gguf"
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    write_gguf(model, path, kind=Kind.F32, more=tokenizer_metadata(SHIPPED))
    ours, theirs = needed_tokenizer(path), needed_tokenizer(SHIPPED)
    text = "The module os <|eos|> <|endoftext|>\n  caf\u00e9"
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"] and len(ours) == len(theirs)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert sorted(set(end_ids(path, ours))) == sorted(set(end_ids(SHIPPED, theirs)))
    tokens = []
    for where in (path, SHIPPED):
        with launch_engine(model=where, devices=2, planner="even", fleet=ThreadFleet()) as engine:
            tokens.append(list(engine.stream(ids, GREEDY)))
    assert tokens[0] == tokens[1]


def test_a_turn_ends_with_its_own_token(tmp_path):
    more: dict[str, object] = {"tokenizer.ggml.tokens": [*(f"t{i}" for i in range(95)), "<|im_end|>"]}
    write_gguf(small_model("llama"), tmp_path / "m.gguf", more=more)
    assert read_config(tmp_path).eos_token_id == [2, 95]
    write_gguf(small_model("llama"), tmp_path / "m.gguf", more={"tokenizer.ggml.eot_token_id": 7})
    assert end_ids(tmp_path, SimpleNamespace(eos_token_id=2)) == [2, 2, 7]
