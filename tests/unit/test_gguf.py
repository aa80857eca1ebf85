"""GGUF files: what their blocks mean, and models read from them slice by slice."""

from __future__ import annotations

import contextlib

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_files import MODELS, small_model, write_gguf
from transformers import PreTrainedModel

from splitray.arch import Range
from splitray.errors import InputError, ModelError
from splitray.model.gguf_source import GgufSource
from splitray.model.weights.gguf_types import PLAIN, QUANTISED, block_of, floats, inputs_of, quantised, type_named

Kind = GGMLQuantizationType


def rows_of(kind: Kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every number, scale and minimum there is, infinite ones too."""
    size = GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, wanted, equal_nan=True)


def values_of(raw: np.ndarray, kind: Kind) -> np.ndarray:
    made = quantised(raw, kind)
    assert made is not None
    matrix, minima = made
    with np.errstate(all="ignore"):
        values = matrix.values()
        if minima is not None:
            values = values - np.repeat(minima, matrix.group, axis=1)
    return values


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
@pytest.mark.parametrize("fill", [None, 0x00, 0xFF, 0x7B, 0x80])
def test_blocks_are_the_numbers_that_gguf_makes_of_them(kind, fill):
    raw = rows_of(kind, 67, 3)
    if fill is not None:
        raw[:] = fill
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(raw, kind)
    assert same(floats(raw, kind), wanted)
    assert same(values_of(raw, kind), wanted)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_many_rows_are_unpacked_in_parts(kind, monkeypatch):
    raw = rows_of(kind, 9, 2, seed=1)
    monkeypatch.setattr("splitray.model.weights.gguf_types._AT_ONCE", 1024)
    with np.errstate(all="ignore"):
        assert same(values_of(raw, kind), quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda k: k.name)
def test_plain_floats_have_no_groups(kind):
    raw = rows_of(kind, 5, 64)
    assert floats(raw, kind).shape == (5, 64) and quantised(raw, kind) is None


def test_rows_are_whole_blocks():
    assert block_of(Kind.Q4_0) == (32, 18) and inputs_of(Kind.Q4_0, 36) == 64


@pytest.mark.parametrize(("number", "name"), [(int(Kind.IQ1_S), "IQ1_S"), (999, "999")])
def test_other_types_are_refused_by_name(number, name):
    with pytest.raises(InputError, match=name) as refused:
        type_named(number, file="m.gguf", tensor="output.weight")
    assert "output.weight" in refused.value.what and "m.gguf" in refused.value.what


@pytest.fixture(scope="module", params=list(MODELS))
def written(request, tmp_path_factory) -> tuple[PreTrainedModel, GgufSource]:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    model = small_model(request.param)
    write_gguf(model, path)
    return model, GgufSource(path)


def test_parameters_come_back_under_their_own_names(written):
    model, source = written
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor), name
        assert source.shape(name) == tuple(tensor.shape), name
        ranges = [Range(1, 2), Range(0, 2)]
        assert torch.equal(source.read(name, ranges=ranges), torch.cat([tensor[1:2], tensor[:2]])), name
        if tensor.ndim > 1:
            wanted = torch.cat([tensor[:, 3:9], tensor[:, :1]], dim=1)
            assert torch.equal(source.read(name, axis=1, ranges=[Range(3, 9), Range(0, 1)]), wanted), name
    assert source.key("model.layers.0.of_nobody.weight") is None
    with pytest.raises(ModelError, match="of_nobody"):
        source.read("model.layers.0.of_nobody.weight")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_blocks_are_read_by_rows_and_columns(tmp_path, family):
    model = small_model(family)
    write_gguf(model, tmp_path / "m.gguf", kind=Kind.Q8_0)
    source = GgufSource(tmp_path)
    assert source.stored_format() == "int8"
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        whole = source.read(name)
        torch.testing.assert_close(whole, model.state_dict()[name], atol=2e-3, rtol=0)
        assert torch.equal(source.read(name, axis=1, ranges=[Range(5, 40)]), whole[:, 5:40])
        for axis, ranges in ((0, [Range(8, 24), Range(0, 8)]), (1, [Range(32, 64)])):
            made = source.read_quantised(name, axis=axis, ranges=ranges)
            assert made is not None and made[1] is None
            assert np.array_equal(made[0].values(), source.read(name, axis=axis, ranges=ranges).numpy())
        assert source.read_quantised(name, axis=1, ranges=[Range(5, 40)]) is None


def test_bytes_read_are_those_of_the_slices(tmp_path):
    write_gguf(small_model("llama"), tmp_path / "m.gguf", kind=Kind.Q8_0)
    source = GgufSource(tmp_path / "m.gguf")
    assert source.bytes_read == 0
    source.read("model.layers.0.self_attn.q_proj.weight", ranges=[Range(0, 16)])
    assert source.bytes_read == 16 * 2 * 34
    source.read("model.layers.0.self_attn.o_proj.weight", axis=1, ranges=[Range(0, 32)])
    assert source.bytes_read == 16 * 2 * 34 + 64 * 34


def test_a_split_file_is_one_model(tmp_path):
    model = small_model("llama")
    write_gguf(model, tmp_path / "m.gguf", split=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for path in (tmp_path, parts[1]):
        source = GgufSource(path)
        assert all(torch.equal(source.read(n), t) for n, t in model.state_dict().items())
    parts[1].unlink()
    with pytest.raises(ModelError, match=parts[1].name) as refused:
        GgufSource(parts[0])
    assert "3 parts" in refused.value.expected and "missing parts" in refused.value.remedy


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    path, cut = tmp_path / "m.gguf", tmp_path / "cut.gguf"
    write_gguf(small_model("llama"), path)
    whole = path.read_bytes()
    for size in [0, 3, 4, 20, 24, *range(100, len(whole) - 64, len(whole) // 29), len(whole) - 256]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cut.gguf"):
            GgufSource(cut)


@pytest.mark.parametrize("at", range(4, 400, 9))
def test_a_header_with_wrong_bytes_is_refused_or_read(tmp_path, at):
    path = tmp_path / "m.gguf"
    write_gguf(small_model("llama"), path)
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        GgufSource(path)


def test_other_files_and_families_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        GgufSource(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="git lfs pull"):
        GgufSource(tmp_path / "m.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="path of one file"):
        GgufSource(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="mamba"):
        GgufSource(tmp_path / "c.gguf")


def test_fingerprints_tell_weights_apart(tmp_path):
    model = small_model("llama")
    write_gguf(model, tmp_path / "a.gguf")
    write_gguf(model, tmp_path / "b.gguf")
    model.state_dict()["model.norm.weight"].add_(1)
    write_gguf(model, tmp_path / "c.gguf")
    a, b, c = (GgufSource(tmp_path / f"{n}.gguf").fingerprint() for n in "abc")
    assert a == b != c
