"""Quantised checkpoints that the tests pack word by word, against the formulas of their methods."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_words import AWQ_ORDER, words

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.opened import open_checkpoint
from splitray.model.packed_checkpoint import PackedCheckpoint
from splitray.model.weights.stored.method import stored_method

O, I = 48, 256  # noqa: E741


def numbers_of(bits, groups, seed=0, least=0):
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 1 << bits, (O, I))
    zeros = random.integers(least, 1 << bits, (O, groups))
    scales = torch.from_numpy(random.uniform(0.001, 0.1, (O, groups))).half()
    return numbers, zeros, scales


def dequantised(numbers, zeros, scales, group_of):
    return (torch.from_numpy(numbers) - torch.from_numpy(zeros)[:, group_of]).float() * scales.float()[:, group_of]


def checkpoint(folder, config, tensors):
    tensors["plain.weight"] = torch.arange(12.0).reshape(3, 4).half()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    found = open_checkpoint(folder)
    assert isinstance(found, PackedCheckpoint)
    assert torch.equal(found.read("plain.weight"), tensors["plain.weight"])
    assert found.read_quantised("plain.weight") is None
    return found


def check(found, expected, *, bits=None, group=None):
    """Whole, cut along both axes at odd places, and exactly by groups."""
    name = "m.weight"
    assert found.shapes[name] == tuple(expected.shape) and found.type_of(name) == "F32"
    assert set(found.shapes) == {name, "plain.weight"}
    assert torch.equal(found.read(name), expected)
    some = [Range(3, 9), Range(17, 40)]
    assert torch.equal(found.read(name, ranges=some), torch.cat([expected[3:9], expected[17:40]]))
    assert torch.equal(found.read(name, axis=1, ranges=some), torch.cat([expected[:, 3:9], expected[:, 17:40]], dim=1))
    (exact,) = found.read_quantised(name) or [None]
    assert (found.inexact() == [name]) == (exact is None) == (bits is None)
    if bits is None:
        return
    assert (exact.bits, exact.group) == (bits, group)
    assert np.array_equal(exact.values(), expected.numpy())
    (rows,) = found.read_quantised(name, outputs=[Range(8, 16), Range(24, 40)])
    assert np.array_equal(rows.values(), torch.cat([expected[8:16], expected[24:40]]).numpy())
    cut = found.read_quantised(name, blocks=[Range(64, 128), Range(192, 256)])
    if exact.order is not None:  # its groups are cut
        assert cut is None
        return
    assert [np.array_equal(c.values(), expected[:, a : a + 64].numpy()) for c, a in zip(cut, (64, 192), strict=True)]


@pytest.mark.parametrize("size", [64, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq(tmp_path, version, size):
    groups = 1 if size == -1 else I // size
    numbers, zeros, scales = numbers_of(4, groups)
    tensors = {"m.qweight": words(numbers.T, 4, AWQ_ORDER), "m.qzeros": words(zeros.T, 4, AWQ_ORDER),
               "m.scales": scales.T}  # fmt: skip
    if version == "gemv":  # zeros and scales are as wide as whole words
        wide = 8 * (2 if size == 64 else 1)
        tensors = {"m.qweight": words(numbers, 4), "m.qzeros": words(np.pad(zeros, [(0, 0), (0, wide - groups)]), 4),
                   "m.scales": torch.nn.functional.pad(scales, (0, wide - groups))}  # fmt: skip
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version}
    found = checkpoint(tmp_path, config, tensors)
    of = np.repeat(np.arange(groups), I // groups)
    check(found, dequantised(numbers, zeros, scales, of), bits=4, group=64 if size == 64 else 128)


@pytest.mark.parametrize("order", [None, "act"])
@pytest.mark.parametrize("size", [64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, version, bits, size, order):
    groups = 1 if size == -1 else I // size
    numbers, zeros, scales = numbers_of(bits, groups)
    of = np.repeat(np.arange(groups), I // groups)
    if order:
        of = np.random.default_rng(1).permutation(of)
    stored = words(zeros.T, bits)
    if version == "gptq":  # GPTQModel takes one from each number of a word as from a whole
        stored -= 0x11111111 if bits == 4 else 0x01010101
    tensors = {"m.qweight": words(numbers, bits).T, "m.qzeros": stored, "m.scales": scales.T,
               "m.g_idx": torch.from_numpy(of).int()}  # fmt: skip
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
    found = checkpoint(tmp_path, config, tensors)
    assert (found.read_quantised("m.weight")[0].order is not None) == (order is not None and groups > 1)
    check(found, dequantised(numbers, zeros, scales, of), bits=bits, group=64 if size == 64 else 128)


def test_a_slice_reads_its_words_only(tmp_path):
    numbers, zeros, scales = numbers_of(4, 2)
    tensors = {"m.qweight": words(numbers, 4).T, "m.qzeros": words(zeros.T, 4), "m.scales": scales.T}
    found = checkpoint(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 128}, tensors)
    before = found.bytes_read
    found.read("m.weight", ranges=[Range(8, 16)])
    assert found.bytes_read - before == 8 * I // 2 + 2 * 8 // 2 + 2 * 8 * 2
    before = found.bytes_read
    found.read("m.weight", axis=1, ranges=[Range(128, 192)])
    assert found.bytes_read - before == O * 64 // 2 + O // 2 + O * 2


def compressed_config(form="pack-quantized", **weights):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packed(tmp_path, bits, groups, symmetric):
    numbers, zeros, scales = numbers_of(bits, groups)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    tensors = {
        "m.weight_packed": words(numbers, bits),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([O, I]),
    }
    if not symmetric:
        tensors["m.weight_zero_point"] = words(zeros.T, bits).T
    found = checkpoint(tmp_path, compressed_config(num_bits=bits), tensors)
    of = np.repeat(np.arange(groups), I // groups)
    check(found, dequantised(numbers, zeros, scales, of), bits=bits, group=min(128, I // groups))


@pytest.mark.parametrize("scale_shape", [(), (1,), (O, 1), (O, 4)])
def test_compressed_tensors_bytes(tmp_path, scale_shape):
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (O, I), generator=random).to(torch.int8)
    scale = torch.rand(scale_shape, generator=random).bfloat16()
    config = compressed_config("int-quantized", num_bits=8)
    found = checkpoint(tmp_path, config, {"m.weight": weight, "m.weight_scale": scale})
    groups = scale_shape[1] if len(scale_shape) == 2 else 1
    wide = scale.float().reshape(-1, groups).repeat_interleave(I // groups, dim=1)
    check(found, weight.float() * wide, bits=8, group=min(128, I // groups))


def fp8_weight(rows=O, columns=I):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scale_shape", [(), (1,), (O, 1), (O,)])
def test_fp8_of_a_tensor_or_channels(tmp_path, scale_shape):
    weight, scale = fp8_weight(), torch.rand(scale_shape) + 0.5
    tensors = {"m.weight": weight, "m.weight_scale": scale, "m.input_scale": torch.tensor(1.0)}
    found = checkpoint(tmp_path, compressed_config("float-quantized", num_bits=8, type="float"), tensors)
    check(found, weight.float() * scale.reshape(-1, 1))


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.uint8])
def test_fp8_blocks_as_transformers_has_them(tmp_path, scale_type):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, random = fp8_weight(256, 384), torch.Generator().manual_seed(1)
    scale = torch.randint(120, 130, (2, 3), generator=random) if scale_type == torch.uint8 else torch.rand(2, 3)
    scale = scale.to(scale_type)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["plain"]}
    found = checkpoint(tmp_path, config, {"m.weight": weight, "m.weight_scale_inv": scale})
    check(found, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))


def test_fp8_blocks_that_are_not_whole(tmp_path):
    weight, scale = fp8_weight(200, 300), torch.rand(2, 3) + 0.5
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = checkpoint(tmp_path, config, {"m.weight": weight, "m.weight_scale_inv": scale})
    wide = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    check(found, weight.float() * wide)


def test_mxfp4_as_transformers_has_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, O, 4, 16), generator=random).to(torch.uint8)
    scales = torch.randint(110, 135, (3, O, 4), generator=random).to(torch.uint8)
    tensors = {"m.gate_up_proj_blocks": blocks, "m.gate_up_proj_scales": scales}
    found = checkpoint(tmp_path, {"quant_method": "mxfp4"}, tensors)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    name = "m.gate_up_proj"
    assert found.shapes[name] == tuple(expected.shape) and found.inexact() == []
    assert torch.equal(found.read(name), expected)
    assert torch.equal(found.read(name, ranges=[Range(2, 3), Range(0, 1)]), expected[[2, 0]])
    exact = found.matrices[name].slab(found._stored, 1, Range(8, 24), Range(32, 96)).quantised()
    assert (exact.bits, exact.group) == (8, 32)
    assert np.array_equal(exact.values(), expected[1].T[8:24, 32:96].numpy())
    whole = found.read_quantised_expert(name, 2)
    assert whole is not None and np.array_equal(whole.values(), expected[2].T.numpy())


@pytest.mark.parametrize("scale", [0, 1, 254, 255])
def test_mxfp4_at_the_ends_of_its_exponents(tmp_path, scale):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16)
    scales = torch.full((1, 1, 1), scale, dtype=torch.uint8)
    found = checkpoint(tmp_path, {"quant_method": "mxfp4"}, {"m.w_blocks": blocks, "m.w_scales": scales})
    assert torch.equal(found.read("m.w"), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


OTHERS = ["bitsandbytes", "hqq", "quanto", "torchao", "aqlm", "eetq", "vptq", "quip", "spqr", "higgs", "fbgemm_fp8"]


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_name(method):
    with pytest.raises(ModelError, match=method) as caught:
        stored_method({"quant_method": method})
    assert "not quantised" in caught.value.remedy


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no name"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
        ({"quant_method": "awq", "bits": 8}, "8"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 3}, "3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "all"),
        (compressed_config("nvfp4-pack-quantized"), "nvfp4"),
        (compressed_config(num_bits=2), "2"),
        (compressed_config() | {"transform_config": {"r1": {}}}, "r1"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "[0, 128]"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp4"),
    ],
)
def test_variants_that_are_not_read_are_refused(config, said):
    with pytest.raises(ModelError) as caught:
        stored_method(config)
    assert said in caught.value.actual


def test_tensors_that_do_not_fit_together_are_refused(tmp_path):
    numbers, zeros, scales = numbers_of(4, 2)
    config = {"quant_method": "awq", "bits": 4, "group_size": 128}
    whole = {"m.qweight": words(numbers.T, 4, AWQ_ORDER), "m.qzeros": words(zeros.T, 4, AWQ_ORDER)}
    with pytest.raises(ModelError, match="m.scales"):
        checkpoint(tmp_path, config, dict(whole))
    with pytest.raises(ModelError, match="qzeros"):
        checkpoint(tmp_path, config, whole | {"m.scales": scales.T[:, :8]})


@pytest.mark.parametrize(("end", "wrong"), [("qweight", torch.int64), ("qweight", torch.float32),
                                            ("qzeros", torch.int16), ("scales", torch.int32)])  # fmt: skip
def test_numbers_of_other_types_are_refused(tmp_path, end, wrong):
    """Their bits would be read as other numbers: the model would say anything."""
    numbers, zeros, scales = numbers_of(4, 2)
    whole = {"m.qweight": words(numbers, 4).T, "m.qzeros": words(zeros.T, 4), "m.scales": scales.T}
    whole[f"m.{end}"] = whole[f"m.{end}"].to(wrong)
    with pytest.raises(ModelError, match=rf"m\.{end}.*copy the checkpoint again"):
        checkpoint(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 128}, whole)


def test_compressed_tensors_in_act_order(tmp_path):
    numbers, zeros, scales = numbers_of(4, 4)
    zeros[:] = 8
    of = np.random.default_rng(1).permutation(np.repeat(np.arange(4), I // 4))
    tensors = {"m.weight_packed": words(numbers, 4), "m.weight_scale": scales, "m.weight_shape": torch.tensor([O, I]),
               "m.weight_g_idx": torch.from_numpy(of).int()}  # fmt: skip
    found = checkpoint(tmp_path, compressed_config(num_bits=4, actorder="group"), tensors)
    assert found.read_quantised("m.weight")[0].order is not None
    check(found, dequantised(numbers, zeros, scales, of), bits=4, group=64)


def test_a_model_reads_its_parameters_by_their_names(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
                         num_hidden_layers=1, vocab_size=32)  # fmt: skip
    model = LlamaForCausalLM(config)
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = expected[name] = tensor
            continue
        numbers = np.random.default_rng(0).integers(0, 16, tuple(tensor.shape))
        scales = torch.rand(len(tensor), 2).half()
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.qweight": words(numbers, 4).T, f"{module}.scales": scales.T,
                    f"{module}.qzeros": words(np.full((2, len(tensor)), 7), 4)}  # fmt: skip
        expected[name] = dequantised(numbers, np.full((len(tensor), 2), 8), scales, np.arange(64) // 32)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": said}))
    found = open_checkpoint(tmp_path)
    assert set(found.names.keys) == set(expected) and not found.names.unused
    assert found.names.shapes == {n: tuple(t.shape) for n, t in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name
