"""What planners count for weights in each format is what devices hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from splits import split
from transformers import AutoModelForCausalLM, LlamaConfig

from splitray.arch import held_as
from splitray.catalog import architecture
from splitray.model.reading import read_arch
from splitray.placement import LayerPlacement, Placement, Shares, weight_bytes
from splitray.planners import make_planner
from splitray.planners.memory import model_bytes, needed_bytes
from splitray.planners.optimum.space import Space
from splitray.planners.protocol import ClusterState
from splitray.topology import DeviceId, Topology
from splitray.weight_formats import FORMATS

LAYERS, VOCAB, COLUMNS = 2, 512, 512


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def model(request):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=COLUMNS, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def as_stored(monkeypatch):
    """Count numbers, scales and zeros alone, as devices report them: what kernels keep beside them is in no tensor."""
    for name, kind in FORMATS.items():
        zeros = kind.bits if kind.bits < 8 else 0
        bits = kind.bits + ((32 + zeros) / kind.group if kind.is_quantised else 0)
        monkeypatch.setitem(FORMATS, name, replace(kind, resident_bits=bits))


def shares(total: int, first: int) -> Shares:
    return Shares.of({"edge0": [(0, first)], "cloud0": [(first, total)]})


CUT = Placement(
    tuple(LayerPlacement(Shares.whole(2, d), Shares.whole(COLUMNS, d)) for d in ("edge0", "cloud0")),
    (DeviceId("edge0"),),
    Shares.whole(VOCAB, "edge0"),
)
SHARED = Placement(
    (LayerPlacement(shares(2, 1), shares(COLUMNS, 128)),) * LAYERS,
    (DeviceId("edge0"), DeviceId("cloud0")),
    shares(VOCAB, 64),
)


@pytest.mark.thin(3)
@pytest.mark.parametrize("placement", [CUT, SHARED], ids=["cut", "shared"])
@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_counted_is_what_devices_hold(weights, placement, model, as_stored):
    with split(model, weights=weights, placement=placement) as engine:
        found = {DeviceId(d): s["weight_bytes"] for d, s in engine.stats().items()}
        counted = weight_bytes(placement, engine.arch)
    norms = 4 * 256 * (2 * LAYERS + 1)
    for device, held in found.items():
        assert counted[device] <= held <= counted[device] + norms + 0.005 * held, (
            "norms, and zeros that fill half a byte"
        )


@pytest.mark.parametrize("weights", FORMATS)
def test_all_planners_count_alike(weights, model):
    arch = held_as(read_arch(model.config)[0], weights)
    one = Placement(
        (LayerPlacement(Shares.whole(2, "edge0"), Shares.whole(COLUMNS, "edge0")),) * LAYERS,
        (DeviceId("edge0"),),
        Shares.whole(VOCAB, "edge0"),
    )
    state = ClusterState(arch=arch, topology=Topology.uniform(2), context_tokens=100)
    needed = needed_bytes(one, state)[DeviceId("edge0")]
    assert model_bytes(state) == pytest.approx(needed, rel=1e-3)
    space = Space(state)
    pieces = sum(
        p.count * p.piece_bytes[0]
        for k in space.kinds for p in space.pieces(k) if not (k == "head" and space.shares_table[0])
    )  # fmt: skip
    assert space.table_bytes[0] + pieces == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize(("weights", "beside"), [("int4", "int8"), ("int4/128", "int8"), ("int8", "int8")])
def test_tables_of_few_bits_have_eight(weights, beside, model):
    arch, other = (held_as(read_arch(model.config)[0], w) for w in (weights, beside))
    assert arch.table_bytes(1000) == other.weight_bytes(1000)


@pytest.mark.parametrize("planner", ["drift_plus_penalty", "proportional"])
def test_cuts_that_move_to_borders_keep_within_full_devices(planner):
    arch = held_as(architecture("llama-13b", dtype="float32"), "int4")
    where = Topology.uniform(2)
    devices = tuple(
        replace(d, memory_bytes=m, memory_bandwidth_bytes_per_s=s)
        for d, m, s in zip(where.devices, (8e9, 16e9), (2e10, 1.6e10), strict=True)
    )
    state = ClusterState(arch=arch, topology=replace(where, devices=devices), context_tokens=512)
    needed = needed_bytes(make_planner(planner).propose(state), state)
    assert needed[DeviceId("edge0")] <= 8e9
