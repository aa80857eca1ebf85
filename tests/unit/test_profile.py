"""A profile is a topology whose numbers say where they come from; its predictions are held against real devices."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml

from splitray.arch import ModelArch
from splitray.cost import CostModel, Rates
from splitray.errors import InputError, TopologyError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.profile import MEASURED, CoreSpeed, LinkSpeed, Profile
from splitray.topology import FormatSpeed, Topology, parse_topology

CORE = CoreSpeed(gemv_bytes_per_s=24e9, gemm_flops_per_s=1e11, copy_bytes_per_s=12e9)
LINK = LinkSpeed(ping_s=4e-5, mebibyte_s=2.2e-4)
INT4 = FormatSpeed(name="int4", weights_per_s=1e10, shared_weights_per_s=8e9, prompt_weights_per_s=5e10, launch_s=2e-4)
ARCH = ModelArch(
    name="small", num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, hidden_dim=32, ffn_dim=64, vocab=128,
    context_tokens=256,
)  # fmt: skip


def make_profile(num_devices: int = 2) -> Profile:
    return Profile(
        measured_at="2026-11-24T12:00:00+00:00", machine={"cores": 2, "processor": "a processor"}, memory_bytes=8e9,
        read_bytes_per_s=20e9, shared_bytes_per_s=15e9 if num_devices > 1 else None, launch_s=6e-5, hop_s=9e-5,
        hop_bytes=3072, cores=[CORE] * num_devices,
        links={(a, b): LINK for b in range(num_devices) for a in range(b)}, formats=[INT4],
    )  # fmt: skip


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_a_profile_file_is_a_topology_file(tmp_path: Path, num_devices: int):
    profile = make_profile(num_devices)
    profile.save(tmp_path / "here.yaml")
    topology = Topology.load(tmp_path / "here.yaml")
    assert topology == profile.topology()
    assert topology.ids == Topology.uniform(num_devices).ids
    assert len(topology.links) == num_devices * (num_devices - 1)
    device = topology.devices[0]
    assert device.memory_bandwidth_bytes_per_s * device.memory_efficiency == 20e9
    assert device.compute_flops * device.compute_efficiency == 1e11
    assert device.launch_s == 6e-5
    assert device.formats == (INT4,)


def test_every_number_of_a_profile_file_says_where_it_comes_from():
    document = make_profile().document()
    about = document["profile"]
    assert about["measured_at"] == "2026-11-24T12:00:00+00:00"
    told = {*about["measured"], *about["from_system"], *about["from_catalog"]}
    assert set(about["measured"]) == set(MEASURED)
    stated = {*document["devices"][0], *document["links"][0]}
    chosen = {"id", "tier", "catalog", "between", "memory_group", "compute_efficiency", "memory_efficiency"}
    assert stated - chosen <= told
    assert not {"idle_w", "active_w"} & stated, "watts are not measured"
    assert all("not measured" in about["from_catalog"][w] for w in ("idle_w", "active_w"))


def test_a_message_costs_the_measured_hop():
    link = make_profile().topology().links[0]
    assert link.transfer_s(3072) == pytest.approx(9e-5)
    assert link.transfer_s(1 << 20) == pytest.approx(9e-5 + 2e-4, rel=0.05)


def test_a_hop_below_its_ping_adds_nothing():
    link = LinkSpeed(ping_s=1.0, mebibyte_s=2.0)
    profile = make_profile()
    slow = Profile(**{**{f: getattr(profile, f) for f in profile.__slots__}, "links": {(0, 1): link}})
    assert slow.topology().links[0].exchange_s == 0


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"memory_group": None}, "memory_group"),
        ({"shared_bandwidth_bytes_per_s": None}, "memory_group"),
        ({"shared_bandwidth_bytes_per_s": 30e9}, "shared_bandwidth_bytes_per_s"),
        ({"shared_bandwidth_bytes_per_s": 0}, "shared_bandwidth_bytes_per_s"),
    ],
)
def test_half_a_memory_group_or_an_impossible_rate_is_refused(change: dict[str, object], where: str):
    document = make_profile().document()
    device = {**document["devices"][0], **change}
    document["devices"][0] = {k: v for k, v in device.items() if v is not None}
    with pytest.raises(TopologyError, match=where):
        parse_topology(document)


def test_a_profile_key_that_is_no_mapping_is_refused():
    with pytest.raises(TopologyError, match=r"topology\.profile"):
        parse_topology({**make_profile().document(), "profile": "yesterday"})


def placed(*shares: dict[str, list[tuple[int, int]]]) -> Placement:
    attention, ffn = (Shares.of(s) for s in shares)
    layers = (LayerPlacement(attention, ffn),) * ARCH.num_layers
    first = attention.devices[0]
    return Placement(layers, (first,), Shares.whole(ARCH.vocab, first))


def tpot_s(topology: Topology, placement: Placement) -> float:
    return CostModel(ARCH, topology).tpot_s(placement, context_tokens=1)


def without_sharing(profile: Profile) -> Topology:
    document = profile.document()
    for device in document["devices"]:
        del device["memory_group"], device["shared_bandwidth_bytes_per_s"]
    return parse_topology(document)


def test_devices_of_one_memory_slow_each_other_down_only_while_both_read():
    """Of 4 groups 3 to 1: the larger part reads one group's bytes at the shared rate and two at its own."""
    profile = make_profile()
    together, apart = profile.topology(), without_sharing(profile)
    a, b = together.ids
    one = placed({a: [(0, 4)]}, {a: [(0, 64)]})
    cut = placed({a: [(0, 4)]}, {b: [(0, 64)]})
    for alone in (one, cut):
        assert tpot_s(together, alone) == tpot_s(apart, alone)
    uneven = placed({a: [(0, 3)], b: [(3, 4)]}, {a: [(0, 64)]})
    group = ARCH.weight_bytes(ARCH.group_params) + ARCH.kv_bytes_per_token
    more = ARCH.num_layers * group * (1 / 15e9 - 1 / 20e9)
    assert tpot_s(together, uneven) - tpot_s(apart, uneven) == pytest.approx(more, rel=1e-6)


def test_the_third_reader_costs_as_much_as_the_second():
    together, apart = make_profile(3).topology(), without_sharing(make_profile(3))
    a, b, c = together.ids
    group = ARCH.weight_bytes(ARCH.group_params) + ARCH.kv_bytes_per_token
    per_reader = ARCH.num_layers * group * (1 / 15e9 - 1 / 20e9)
    two = placed({a: [(0, 1)], b: [(1, 4)]}, {a: [(0, 64)]})
    three = placed({a: [(0, 2)], b: [(2, 3)], c: [(3, 4)]}, {a: [(0, 64)]})
    assert tpot_s(together, two) - tpot_s(apart, two) == pytest.approx(per_reader, rel=1e-6)
    assert tpot_s(together, three) - tpot_s(apart, three) == pytest.approx(2 * per_reader, rel=1e-6)


def test_rates_that_share_a_memory_stack_and_select():
    rates = Rates.of(make_profile().topology())
    both = Rates.stack([rates, Rates.of(without_sharing(make_profile()))])
    assert both.shares_memory and not both.take([1]).shares_memory
    assert np.array_equal(both.take([0]).contention_s_per_byte, rates.contention_s_per_byte)


def test_a_profile_is_refused_before_anything_is_measured(tmp_path: Path):
    pytest.importorskip("torch")
    from splitray.commands.profile import measure

    with pytest.raises(InputError, match="1 to 16 devices"):
        measure(devices=0)
    for wrong in (tmp_path, tmp_path / "missing" / "here.yaml"):
        with pytest.raises(InputError, match="folder that exists"):
            measure(out=wrong)


@pytest.mark.usefixtures("forked_devices")
@pytest.mark.full
@pytest.mark.slow
@pytest.mark.alone
def test_predictions_of_a_real_profile_are_near_what_devices_take(tmp_path: Path):
    """The machinery, not the accuracy, which `splitray bench --suite predicted` tells on a quiet machine."""
    from splitray.profiling.predicted import predicted
    from splitray.profiling.random_llama import RandomLlama
    from splitray.runtime.launch import launch_engine
    from splitray.runtime.sampling import Sampling

    recipe = RandomLlama(
        name="small", layers=6, hidden=512, heads=8, kv_heads=4, ffn=1408, vocab=1024, tied=True
    )  # fmt: skip
    document = predicted(recipe, num_random=2, rounds=1, formats=("float32", "int4"))
    rows = {r["name"]: r for r in document["rows"]}
    assert set(rows) == {
        "split_half", "replicated", "replicated_whole_head", "layer_cut", "one_device", "random_0", "random_1",
    }  # fmt: skip
    for name, row in rows.items():
        assert 1 / 3 < row["predicted_ms"] / row["measured_ms"] < 3, (name, row)
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
    errors = [abs(r["error"]) for r in rows.values()]
    assert document["worst_error"] == max(errors)
    assert document["median_error"] == pytest.approx(float(np.median(errors)))

    assert set(document["formats"]) == {"float32", "int4"}
    few = document["formats"]["int4"]
    assert [r["name"] for r in few["rows"]] == list(rows)
    assert few["profile"]["devices"][0]["formats"]["int4"]["weights_per_s"] > 1e8

    about = document["profile"]["profile"]
    age = datetime.now(UTC) - datetime.fromisoformat(about["measured_at"])
    assert timedelta(0) <= age < timedelta(minutes=5)
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(document["profile"]))
    device = Topology.load(path).devices[0]
    assert 5e8 < device.memory_bandwidth_bytes_per_s < 1e12
    assert device.memory_group == "host"
    with launch_engine(model="tiny", topology=path, planner="exact") as engine:
        assert len(list(engine.stream([5, 6, 7], Sampling(max_new_tokens=4)))) == 4
