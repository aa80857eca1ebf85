"""Codecs: their arithmetic against scalar references, and what they do to a model split over a wire."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from splits import greedy, report_of, split

from splitray.arch import ModelArch
from splitray.catalog import architecture
from splitray.codecs import CODECS, Codec, as_codec, decode, encode, encoded_bytes
from splitray.cost import CostModel, load_of
from splitray.errors import InputError
from splitray.model.reading import read_arch
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.route import compile_route, message_bytes
from splitray.runtime.device.coded import CodedCrossing
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.launch import launch_engine, read_model
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

LOSSY = [c for c in CODECS if c != "none"]
PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
BITS = {"bf16": 2**-8, "int8": 1 / 254, "int4": 1 / 14 * 1.01}  # largest error, of the largest value in its reach


def round_trip(codec: Codec, x_ND: np.ndarray) -> np.ndarray:
    """What a receiver makes of N tokens."""
    return decode(codec, encode(codec, x_ND), x_ND.shape[-1])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rows(n: int, hidden: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, hidden)) * 10.0 ** rng.integers(-6, 6, (n, 1))).astype(np.float32)


# --- the arithmetic


@pytest.mark.parametrize("hidden", [1, 5, 31, 32, 33, 48, 128])
@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_are_as_many_as_promised_and_come_back_close(codec, hidden):
    x = rows(20, hidden)
    coded = encode(codec, x)
    assert coded.nbytes == encoded_bytes(codec, 20, hidden)
    back = decode(codec, coded, hidden)
    assert back.shape == x.shape and back.dtype == np.float32
    if codec == "none":
        assert back.tobytes() == x.tobytes()
        return
    reach = {"bf16": np.abs(x), "int8": np.abs(x).max(-1, keepdims=True), "int4": group_maxima(x)}[codec]
    assert (np.abs(back - x) <= reach * BITS[codec] * 1.0001).all()


def group_maxima(x: np.ndarray) -> np.ndarray:
    return np.stack([np.abs(x[:, i // 32 * 32 : i // 32 * 32 + 32]).max(-1) for i in range(x.shape[1])], axis=-1)


@pytest.mark.parametrize(
    ("codec", "positions", "hidden", "expected"),
    [("none", 3, 48, 576), ("bf16", 3, 48, 288), ("int8", 3, 48, 156), ("int4", 3, 48, 84), ("int4", 1, 33, 21)],
)
def test_encoded_bytes_by_hand(codec, positions, hidden, expected):
    assert encoded_bytes(codec, positions, hidden) == expected


def test_exact_values_of_a_bf16_model_take_two_bytes():
    assert encoded_bytes("none", 3, 48, dtype_bytes=2) == 288
    assert encoded_bytes("int8", 3, 48, dtype_bytes=2) == 156


def test_bf16_is_torch_s_bfloat16_specials_included():
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40, np.nan], np.float32)
    x = np.concatenate([rows(50, 64).ravel(), ties, special])
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_trip("bf16", x[None])[0], expected)


def test_int8_and_int4_equal_a_scalar_reference():
    x = rows(4, 70, seed=3)
    for row, eight, four in zip(x, round_trip("int8", x), round_trip("int4", x), strict=True):
        scale = np.float32(max(abs(row)) / np.float32(127))
        assert [round(float(np.float32(v / scale))) * scale for v in row] == pytest.approx(list(eight), abs=0)
        for start in range(0, 70, 32):
            group = row[start : start + 32]
            coarse = torch.tensor(max(abs(group)) / np.float32(7)).bfloat16().float().item()
            said = [max(-7, min(7, round(float(np.float32(v / np.float32(coarse)))))) * coarse for v in group]
            assert said == pytest.approx(list(four[start : start + 32]), rel=1e-6)


def test_the_layouts_are_the_documented_ones():
    x = np.zeros((1, 33), np.float32)
    x[0, :4], x[0, 32] = (127, -1, 0, 64), 14
    coded = encode("int8", x)[0].tobytes()
    assert coded[:8] == struct.pack("<f4b", 1.0, 127, -1, 0, 64)
    x[0, :4] = (7, -7, 1, 0)
    coded = encode("int4", x)[0].tobytes()
    assert coded[:4] == struct.pack("<HH", 0x3F80, 0x4000)  # bfloat16 of 1 and 2
    assert coded[4:6] == bytes([15 | 1 << 4, 9 | 8 << 4])
    assert len(coded) == 4 + 17 and coded[-1] & 15 == 15


@pytest.mark.parametrize("codec", LOSSY)
def test_each_token_is_coded_by_itself_and_zeros_and_tiny_values_survive(codec):
    x = rows(6, 48)
    x[2] = 0
    x[3] = 1e-44
    whole = encode(codec, x)
    for i in range(6):
        assert (encode(codec, x[i : i + 1]) == whole[i]).all()
    back = decode(codec, whole, 48)
    assert (back[2] == 0).all() and np.isfinite(back).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_finite_never_becomes_a_number(codec, bad):
    x = rows(3, 48)
    x[1, 40] = bad
    back = round_trip(codec, x)
    assert not np.isfinite(back[1, 40])
    assert np.isfinite(back[[0, 2]]).all()


def test_an_unknown_codec_is_refused():
    with pytest.raises(InputError) as refused:
        as_codec("int9")
    assert "int8" in refused.value.remedy and "int4" in refused.value.expected
    with pytest.raises(InputError, match="codec"):
        launch_engine(model="tiny", codec="zstd", runtime="local")


# --- the rule: what crosses, and how many bytes

SMALL = ModelArch(
    name="small",
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    hidden_dim=48,
    ffn_dim=40,
    vocab=97,
    context_tokens=128,
)


@pytest.mark.parametrize("codec", CODECS)
def test_route_and_cost_model_count_the_codec_s_bytes_and_x_apart(codec):
    where = Topology.uniform(3)
    a, b, c = where.ids
    both = LayerPlacement(Shares.of({a: [(0, 1)], b: [(1, 3)]}), Shares.of({b: [(0, 13)], c: [(13, 40)]}))
    one = LayerPlacement(Shares.whole(3, c), Shares.whole(40, c))
    placement = Placement((both, one, one), (a,), Shares.whole(97, c))
    route = compile_route(placement, SMALL, where, codec=codec)
    y, x = encoded_bytes(codec, 1, 48), 48 * 4
    apart = 0 if codec == "none" else x
    by_hand = (
        y  # embedding: a's state to b
        + y + y + apart + y  # attention on a, b: a to b; a to c, who lacks x; b to c
        + y  # FFN on b, c: b to c
        + 4  # the token to a
    )  # fmt: skip
    assert route.bytes_per_token(SMALL) == by_hand
    load = load_of(placement, SMALL, where, codec=codec)
    assert (load.position_bytes + load.sequence_bytes).sum() == by_hand
    assert CostModel(SMALL, where, codec=codec).decode(placement, context_tokens=9).sent_bytes.sum() == by_hand
    message = route.boundary(1).messages[0]
    assert message_bytes(message, SMALL, batch=2, positions=5, codec=codec) == encoded_bytes(codec, 10, 48)


# --- the wire


@contextmanager
def recorded(monkeypatch):
    """Every crossing of every device: (position, sub-block) -> device -> (x, own partial, result)."""
    seen: dict[tuple[int, int], dict[str, tuple]] = defaultdict(dict)
    cross = CodedCrossing.cross

    def spy(self, index, x, y, settle):
        kept = [None if t is None else t.clone() for t in (x, y)]
        out = cross(self, index, x, y, settle)
        seen[self.step.position, index][self.me] = (*kept, None if out is None else out.clone())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(CodedCrossing, "cross", spy)
        yield seen


def coded(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(round_trip(codec, x.reshape(-1, x.shape[-1]).numpy())).view(x.shape)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_holders_have_the_bits_of_one_process_that_adds_the_same_coded_partials(codec, family, monkeypatch):
    model = family_model(family)
    checked = 0
    with recorded(monkeypatch) as seen:
        for seed, devices in ((1, 2), (2, 3), (3, 5)):
            seen.clear()
            with split(model, devices=devices, seed=seed, codec=codec) as engine:
                list(engine.stream(PROMPT, Sampling(max_new_tokens=4)))
                assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
                assert report_of(engine).messages_per_token == engine.route.messages_per_token
                blocks, route = engine.route.sub_blocks, engine.route
            for (position, index), by_device in seen.items():
                here, there = blocks[index], blocks[index + 1]
                keep = 1 if there.kind == "head" else len(PROMPT)
                x: Any
                y: Any
                x, y = (None if t is None else t[:, -keep:] for t in by_device[here.lead][:2])
                if here.mode == "partitioned":
                    total = sum(coded(codec, by_device[d][1][:, -keep:]) for d in here.devices)
                    expected = x + total
                else:
                    expected = x if y is None else x + y
                    if any(m.content == "state" for m in route.boundary(index).messages):
                        expected = coded(codec, expected)
                for device in there.devices:
                    assert torch.equal(by_device[device][2], expected), f"{device} at {position}, after {here}"
                    checked += len(there.devices) > 1
    assert checked > 50


def test_a_replicated_sub_block_that_hands_its_state_on_leaves_all_with_the_same_bits(monkeypatch):
    model = family_model("llama")
    where = Topology.uniform(3)
    a, b, c = where.ids
    layers = (
        LayerPlacement(Shares.whole(3, a, b), Shares.of({b: [(0, 20)], c: [(20, 40)]})),
        LayerPlacement(Shares.whole(3, a, b), Shares.whole(40, a, b, c)),
        LayerPlacement(Shares.whole(3, c), Shares.whole(40, c)),
    )
    placement = Placement(layers, (a,), Shares.whole(97, c))
    with (
        recorded(monkeypatch) as seen,
        split(model, topology=where, placement=placement, codec="int4") as engine,
    ):
        list(engine.stream(PROMPT, Sampling(max_new_tokens=3)))
        assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
    for index, holders in ((1, (b, c)), (3, (a, b, c))):  # attention replicated on a, b; c gets the state
        for (position, at), by_device in seen.items():
            if at == index:
                first, *rest = (by_device[d][2] for d in holders)
                assert all(torch.equal(first, other) for other in rest), position


@pytest.mark.parametrize("codec", LOSSY)
def test_logits_equal_a_plain_model_whose_projections_add_the_same_coded_partials(codec):
    model = family_model("llama")
    where = Topology.uniform(2)
    a, b = where.ids
    layer = LayerPlacement(Shares.of({a: [(0, 1)], b: [(1, 3)]}), Shares.of({a: [(0, 13)], b: [(13, 40)]}))
    placement = Placement((layer,) * 3, (a, b), Shares.whole(97, a))
    ids = torch.tensor([PROMPT])
    with split(model, topology=where, placement=placement, codec=codec) as engine:
        got = engine.step(Forward(session=1, ids=ids, position=0, keep=len(PROMPT), capacity=len(PROMPT)))
    with torch.inference_mode():
        exact = model(ids).logits
        for i in range(3):
            head_dim = model.model.layers[i].self_attn.head_dim
            add_coded_parts(model.model.layers[i].self_attn.o_proj, 2 * head_dim, codec)
            add_coded_parts(model.model.layers[i].mlp.down_proj, 13, codec)
        expected = model(ids).logits
    noise = float((expected - exact).abs().mean())
    assert noise > 0
    # A float32 sum in another order may round a value the other way: rare, and one step of the codec.
    assert float((got - expected).abs().mean()) < 0.1 * noise


def add_coded_parts(linear: torch.nn.Linear, cut: int, codec: Codec) -> None:
    def forward(h):
        parts = [h[..., :cut] @ linear.weight[:, :cut].T, h[..., cut:] @ linear.weight[:, cut:].T]
        if linear.bias is not None:
            parts[0] = parts[0] + linear.bias
        return sum(coded(codec, p) for p in parts)

    linear.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "cohere", "qwen3_moe"])
def test_every_wiring_runs_with_a_codec_and_sends_the_rule_s_bytes(family):
    model = family_model(family)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        whole = model(ids).logits
    errors = []
    for codec in ("bf16", "int8"):
        with split(model, devices=3, seed=13, codec=codec) as engine:
            list(engine.stream(PROMPT, Sampling(max_new_tokens=3)))
            assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
            logits = engine.step(Forward(session=1, ids=ids, position=0, keep=len(PROMPT), capacity=len(PROMPT)))
            errors.append(float((logits - whole).abs().max() / whole.abs().max()))
    assert 0 < max(errors) < 0.2, errors


def test_without_a_codec_every_bit_is_as_before():
    model = family_model("llama")
    with split(model, devices=3, seed=4, codec="none") as engine:
        assert engine.route.codec == "none"
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == greedy(model, PROMPT, 8)
        folded = compile_route(engine.placement, engine.arch, engine.topology)
        assert folded == engine.route


def test_a_cut_sends_less_by_the_codec_s_factor():
    arch, _ = read_arch(family_model("llama").config)
    where = Topology.uniform(2)
    placement = make_planner("fixed_cut:1").propose(ClusterState(arch=arch, topology=where))
    sent = {c: compile_route(placement, arch, where, codec=c).bytes_per_token(arch) - 4 for c in CODECS}
    assert sent == {"none": 192, "bf16": 96, "int8": 52, "int4": 28}


@pytest.mark.parametrize("model", ["tiny", "gpt2-xl", "llama-7b"])
@pytest.mark.parametrize("planner", ["fixed_cut:6", "even"])
def test_int8_halves_the_bytes_of_bf16_scales_included(model, planner):
    arch = read_model("tiny")[0] if model == "tiny" else architecture(model)
    where = Topology.uniform(2)
    placement = make_planner(planner).propose(ClusterState(arch=arch, topology=where))
    sent = {c: compile_route(placement, arch, where, codec=c).bytes_per_token(arch) for c in ("bf16", "int8")}
    assert sent["int8"] / sent["bf16"] == pytest.approx(0.5, rel=0.05)
