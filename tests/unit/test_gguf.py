"""GGUF files: what their blocks mean, and models read from them slice by slice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_files import MODELS, small_model, write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from splitray.arch import Range
from splitray.errors import InputError, ModelError
from splitray.model.gguf_config import config_of
from splitray.model.gguf_source import GgufSource
from splitray.model.gguf_tokenizer import tokenizer_of
from splitray.model.weights.gguf_types import PLAIN, QUANTISED, block_of, floats, inputs_of, quantised, type_named
from splitray.text.chat import chat_text
from splitray.weight_formats import StoredWeights

Kind = GGMLQuantizationType


def rows_of(kind: Kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every number, scale and minimum there is, infinite ones too."""
    size = GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, wanted, equal_nan=True)


def alike(raw: np.ndarray, kind: Kind, wanted: np.ndarray) -> bool:
    """The same bits; where a group has a minimum, within 1e-6 of the largest number it can have, if all are finite."""
    made = quantised(raw, kind)
    assert made is not None
    with np.errstate(all="ignore"):
        found = made.values()
        if made.minima is None:
            return same(found, wanted)
        apart = np.abs(found - wanted).reshape(len(raw), -1, made.group)
        most = 1e-6 * (16 * np.abs(made.scales) + np.abs(made.minima))[..., None]
    return bool((apart <= most)[np.isfinite(wanted).reshape(apart.shape) & np.isfinite(most)].all())


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
@pytest.mark.parametrize("fill", [None, 0x00, 0xFF, 0x7B, 0x80])
def test_blocks_are_the_numbers_that_gguf_makes_of_them(kind, fill):
    raw = rows_of(kind, 67, 3)
    if fill is not None:
        raw[:] = fill
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(raw, kind)
    assert same(floats(raw, kind), wanted)
    assert alike(raw, kind, wanted)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_many_rows_are_unpacked_in_parts(kind, monkeypatch):
    raw = rows_of(kind, 9, 2, seed=1)
    monkeypatch.setattr("splitray.model.weights.gguf_types._AT_ONCE", 1024)
    with np.errstate(all="ignore"):
        assert alike(raw, kind, quants.dequantize(raw, kind))


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
        two = min(2, len(tensor))
        ranges = [Range(two - 1, two), Range(0, two)]
        assert torch.equal(source.read(name, ranges=ranges), torch.cat([tensor[two - 1 : two], tensor[:two]])), name
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
    assert source.stored() == StoredWeights("int8", 11.0)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        whole = source.read(name)
        torch.testing.assert_close(whole, model.state_dict()[name], atol=2e-3, rtol=0)
        assert torch.equal(source.read(name, axis=1, ranges=[Range(5, 40)]), whole[:, 5:40])
        for axis, ranges in ((0, [Range(8, 24), Range(0, 8)]), (1, [Range(32, 64)])):
            found = source.read_quantised(name, **{("outputs", "blocks")[axis]: ranges})
            assert found is not None
            (made,) = found
            assert made.minima is None
            assert np.array_equal(made.values(), source.read(name, axis=axis, ranges=ranges).numpy())
        assert source.read_quantised(name, blocks=[Range(5, 40)]) is None


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
    with pytest.raises(ModelError, match="NAME-00001-of-00003.gguf.*such names"):
        GgufSource(parts[0].rename(tmp_path / "first.gguf"))


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


def test_the_config_makes_the_same_model(written):
    model, source = written
    config = config_of(source.file)
    again = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: source.read(name) for name in again.state_dict()}
    again.load_state_dict(state)
    ids = torch.arange(3, 43)[None] * 7 % 96
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def scaled(family: str, rope: Mapping[str, object], **sizes: object) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**{**MODELS[family][1], "rope_parameters": rope, **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: b for n, b in model.named_buffers() if "inv_freq" in n and "original" not in n}


def rotates_alike(model: PreTrainedModel, path: Path) -> PretrainedConfig:
    config = config_of(GgufSource(path).file)
    again = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found, wanted = frequencies(again), frequencies(model)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=2e-5, atol=0)
    scales = [getattr(m.model.rotary_emb, "attention_scaling", None) for m in (model, again)]
    assert scales[0] == pytest.approx(scales[1])
    return config


def test_llama3_scales_its_rotation_by_stored_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = scaled("llama", rope, head_dim=64)
    plain = 1 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = (plain / frequencies(model)["model.rotary_emb.inv_freq"]).numpy().astype(np.float32)
    write_gguf(
        model, tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors}, more={"llama.attention.key_length": 64}
    )
    assert rotates_alike(model, tmp_path / "m.gguf").rope_parameters["rope_type"] == "llama3"


def test_other_stored_factors_are_taken_as_they_are(tmp_path):
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    write_gguf(small_model("llama"), tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    config = config_of(GgufSource(tmp_path).file)
    again = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wanted = 1 / 10_000.0 ** (torch.arange(0, 16, 2) / 16) / torch.from_numpy(factors)
    torch.testing.assert_close(frequencies(again)["model.rotary_emb.inv_freq"], wanted)
    assert again.model.rotary_emb.attention_scaling == 1.0


def test_phi3_has_factors_for_short_and_long(tmp_path):
    short, long = ([float(v) for v in np.linspace(1, n, 6).astype(np.float32)] for n in (2, 9))
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75}  # fmt: skip
    model = scaled("phi3", rope, original_max_position_embeddings=32)
    tensors = {f"rope_factors_{n}.weight": np.array(v, np.float32) for n, v in (("short", short), ("long", long))}
    more: dict[str, object] = {
        "phi3.rope.scaling.original_context_length": 32,
        "phi3.rope.scaling.attn_factor": float(model.model.rotary_emb.attention_scaling),
    }
    write_gguf(model, tmp_path / "m.gguf", tensors=tensors, more=more)
    config = rotates_alike(model, tmp_path / "m.gguf")
    assert config.rope_parameters["long_factor"] == long and config.rope_parameters["partial_rotary_factor"] == 0.75


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_yarn_and_linear_scaling_are_read(tmp_path, kind):
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 32
    model = scaled("qwen3", rope)
    more: dict[str, object] = {"qwen3.rope.scaling.type": kind, "qwen3.rope.scaling.factor": 4.0}
    write_gguf(model, tmp_path / "m.gguf", more=more | {"qwen3.rope.scaling.original_context_length": 32})
    rotates_alike(model, tmp_path / "m.gguf")


def test_gemma3_scales_the_rotation_of_its_global_layers_only(tmp_path):
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}  # fmt: skip
    model = scaled("gemma3_text", rope)
    more: dict[str, object] = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    write_gguf(model, tmp_path / "m.gguf", more=more)
    path = tmp_path / "m.gguf"
    config = config_of(GgufSource(path).file)
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    again = AutoModelForCausalLM.from_config(config)
    for name, values in frequencies(model).items():
        torch.testing.assert_close(frequencies(again)[name], values)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"llama.rope.scaling.type": "su"}, "rope.scaling.type"),
        ({"llama.expert_count": 8}, "expert"),
        ({"llama.attention.head_count_kv": [2, 2]}, "model whose layers are alike"),
    ],
)
def test_what_a_config_cannot_say_is_refused(tmp_path, more, said):
    model = small_model("llama")
    path = tmp_path / "m.gguf"
    write_gguf(model, path, more=more)
    with pytest.raises(ModelError, match=said):
        config_of(GgufSource(path).file)


TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gpt_oss"])
def test_byte_level_tokenizers_and_templates_are_read(tmp_path, family):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["hello world, hello there, held by the world"] * 3, trainer)
    bpe = json.loads(made.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    more: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe" if family == "llama" else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in TOKENS else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in bpe["merges"]],
        "tokenizer.ggml.add_bos_token": family == "llama",
        "tokenizer.chat_template": TEMPLATE,
    }
    write_gguf(small_model(family), tmp_path / "m.gguf", more=more)
    tokenizer = tokenizer_of(GgufSource(tmp_path).file)
    text = "<|im_start|>hello world  held\n\u00e9"
    ids = tokenizer(text)["input_ids"]
    assert ids[: 2 if family == "llama" else 1] == ([1, 3] if family == "llama" else [3])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<|im_start|>")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<|bos|><|im_start|>hello"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    tokenizer.chat_template = "{{ broken }"
    with pytest.raises(InputError, match="the chat template in m.gguf, line 1"):
        chat_text([{"role": "user", "content": "hello"}], tokenizer)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_sentencepiece_tokenizers_are_read(tmp_path, family):
    words = ["\u2581", "\u2581h", "h", "e", "l", "o", "ll", "\u2581he", "\u2581hell", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    more: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_gguf(small_model(family), tmp_path / "m.gguf", more=more)
    tokenizer = tokenizer_of(GgufSource(tmp_path).file)
    ids = tokenizer("hello \u00e9")["input_ids"]
    assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "hello \u00e9"


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    write_gguf(small_model("llama"), tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="prompt-ids"):
        tokenizer_of(GgufSource(tmp_path).file)
    write_gguf(small_model("llama"), tmp_path / "m.gguf", more={"tokenizer.ggml.model": "none"})
    with pytest.raises(ModelError, match="prompt-ids"):
        tokenizer_of(GgufSource(tmp_path).file)
