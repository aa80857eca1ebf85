"""Weights of few bits are priced at the rate at which a device multiplies by them, not by the bytes that they take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from splitray.arch import held_as, held_by
from splitray.catalog import DEVICES, FORMAT_RATES, Value, architecture
from splitray.cost import CostModel, Rates
from splitray.errors import TopologyError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import ClusterState, make_planner
from splitray.planners.layer_times import work_alone_s
from splitray.planners.optimum.floor import floor_s
from splitray.topology import Device, FormatSpeed, Topology, parse_topology
from splitray.weight_formats import FORMATS, as_format

MODEL = architecture("llama-7b", dtype="float32")
INT4 = {"weights_per_s": 1e10, "shared_weights_per_s": 8e9, "prompt_weights_per_s": 5e10, "launch_s": 2e-4}


def where(formats: Any = None, devices: int = 1, **more: Any) -> Topology:
    """Devices that read 20 GB/s."""
    one = {"tier": "edge", "memory_bytes": 1e11, "compute_flops": 1e11, "memory_bandwidth_bytes_per_s": 2e10,
           "launch_s": 1e-5, **({} if formats is None else {"formats": formats}), **more}  # fmt: skip
    ids = [f"d{i}" for i in range(devices)]
    links = [{"between": ids, "bandwidth_bytes_per_s": 1e9, "rtt_s": 0.0}] if devices == 2 else []
    return parse_topology({"devices": [{"id": i, **one} for i in ids], "links": links})


def whole(arch: Any, *devices: Any) -> Placement:
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, devices[0]), Shares.whole(arch.ffn_dim, *devices))
    return Placement((layer,) * arch.num_layers, (devices[0],), Shares.whole(arch.vocab, devices[0]))


def layers(arch: Any) -> int:
    return arch.num_layers * (arch.num_kv_heads * arch.group_params + arch.ffn_dim * arch.ffn_unit_params)


def test_a_token_takes_its_weights_at_the_rate_of_their_format():
    arch, topology = held_as(MODEL, "int4"), where({"int4": INT4})
    by_bytes = CostModel(arch, where()).tpot_s(whole(arch, "d0"), context_tokens=1)
    found = CostModel(arch, topology).tpot_s(whole(arch, "d0"), context_tokens=1)
    fixed = 2e-4 * (2 * arch.num_layers + 1)
    head = found - layers(arch) / 1e10 - fixed
    assert found == pytest.approx(layers(arch) / 1e10 + fixed, rel=0.05)
    assert 0 < head < 0.05 * found
    assert found > 1.5 * by_bytes


def test_plain_weights_and_formats_without_a_speed_are_priced_as_before():
    for weights in ("float32", "int8"):
        arch = held_as(MODEL, weights)
        with_speeds, without = where({"int4": INT4}), where()
        for context in (1, 512):
            found = CostModel(arch, with_speeds).tpot_s(whole(arch, "d0"), context_tokens=context)
            assert found == CostModel(arch, without).tpot_s(whole(arch, "d0"), context_tokens=context)


def test_a_prompt_takes_the_rate_of_many_rows():
    arch = held_as(MODEL, "int4")
    found = CostModel(arch, where({"int4": INT4})).ttft_s(whole(arch, "d0"), prompt_tokens=512)
    assert found == pytest.approx(512 * layers(arch) / 5e10, rel=0.1)
    slow = {k: v for k, v in INT4.items() if k != "prompt_weights_per_s"}
    told = CostModel(arch, where({"int4": slow})).ttft_s(whole(arch, "d0"), prompt_tokens=512)
    assert told == pytest.approx(512 * layers(arch) * 2 / 1e11, rel=0.1)


def test_two_that_share_a_memory_multiply_as_fast_as_they_were_measured():
    more = {"memory_group": "host", "shared_bandwidth_bytes_per_s": 1e10}
    arch, topology = held_as(MODEL, "int4"), where({"int4": INT4}, 2, **more)
    slower = Rates.of(topology, arch).contention_s_per_byte[0, 0, 1] * arch.format.resident_bits / 8
    assert slower == pytest.approx(1 / 8e9 - 1 / 1e10)
    alone = {k: v for k, v in INT4.items() if k != "shared_weights_per_s"}
    assert not Rates.of(where({"int4": alone}, 2, **more), arch).shares_memory, "bound by arithmetic"


def test_a_device_with_other_work_multiplies_as_much_slower():
    device = where({"int4": INT4}).devices[0].slowed(0.5)
    assert device.formats[0] == FormatSpeed(name="int4", weights_per_s=5e9, shared_weights_per_s=4e9,
                                            prompt_weights_per_s=2.5e10, launch_s=2e-4)  # fmt: skip
    assert device.holding("int4").memory_bandwidth_bytes_per_s == pytest.approx(5e9 * FORMATS["int4"].resident_bits / 8)
    assert device.holding("float32") is device


def test_planners_choose_by_the_rates_of_the_format():
    """The device that reads faster multiplies 4-bit weights more slowly."""
    arch = replace(held_as(MODEL, "int4"), num_layers=2)
    devices = [
        {"id": "reads", "tier": "edge", "memory_bytes": 1e11, "compute_flops": 1e11,
         "memory_bandwidth_bytes_per_s": 4e10, "formats": {"int4": {"weights_per_s": 1e9}}},
        {"id": "counts", "tier": "edge", "memory_bytes": 1e11, "compute_flops": 1e11,
         "memory_bandwidth_bytes_per_s": 1e10, "formats": {"int4": {"weights_per_s": 2e10}}},
    ]  # fmt: skip
    topology = parse_topology({"devices": devices, "links": [
        {"between": ["reads", "counts"], "bandwidth_bytes_per_s": 1e9, "rtt_s": 1e-4}]})  # fmt: skip
    state = ClusterState(arch=arch, topology=topology, context_tokens=16)
    for planner in ("exact", "layer_cut"):
        placement = make_planner(planner).propose(state)
        counts = sum(layer.ffn.count("counts") for layer in placement.layers)
        assert counts > 0.8 * 2 * arch.ffn_dim, planner
        assert floor_s(state) <= CostModel(arch, topology).tpot_s(placement, context_tokens=16) * (1 + 1e-9)


def test_devices_of_different_formats_are_each_priced_in_their_own():
    arch, topology = held_by(MODEL, {"d0": "float32", "d1": "int4"}), where({"int4": INT4}, 2)
    state = ClusterState(arch=arch, topology=topology, context_tokens=1)
    stages = work_alone_s(state, topology)
    for i, device in enumerate(topology.ids):
        alone = CostModel(replace(arch.on(device), num_layers=1, device_weights=()), topology)
        found = alone.tpot_s(whole(alone.arch, device), context_tokens=1)
        assert stages[i].sum() == pytest.approx(found - (device != topology.origin) * 1e-9, rel=1e-3)


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ({"int5": {"weights_per_s": 1e9}}, r"devices\[0\].formats.int5"),
        ({"int4": {}}, r"devices\[0\].formats.int4"),
        ({"int4": {"weights_per_s": 0}}, "weights_per_s"),
        ({"int4": {"weights_per_s": -1e9}}, "weights_per_s"),
        ({"int4": {"weights_per_s": "fast"}}, r"devices\[0\].formats.int4.weights_per_s"),
        ({"int4": {"weights_per_s": 1e9, "rate": 3}}, r"devices\[0\].formats.int4.rate"),
        ({"int4": {"weights_per_s": 1e9, "shared_weights_per_s": 2e9}}, "shared_weights_per_s"),
        ({"int4": {"weights_per_s": 1e9, "launch_s": -1}}, "launch_s"),
        ({"int4": 1e9}, r"devices\[0\].formats.int4"),
        ([1], r"devices\[0\].formats"),
    ],
)
def test_a_wrong_speed_is_refused_with_its_place(formats: Any, told: str):
    with pytest.raises(TopologyError) as refused:
        where(formats)
    assert re.search(told, f"{refused.value.where} {refused.value}")


def test_the_catalogue_says_where_each_rate_is_from():
    assert set(FORMAT_RATES) <= set(DEVICES)
    for name, rates in FORMAT_RATES.items():
        device = parse_topology({"devices": [{"id": "d", "tier": "edge", "catalog": name}]}).devices[0]
        assert isinstance(device, Device) and {f.name for f in device.formats} == set(rates)
        for weights, rate in rates.items():
            assert isinstance(rate, Value) and len(rate.source) > 3 and rate.mark != "STATED", as_format(weights)
    own = parse_topology({"devices": [{"id": "d", "tier": "edge", "catalog": "raspberry-pi-5", "formats": {}}]})
    assert own.devices[0].formats == ()
