"""The catalogue: every value has a source, names work in topology files, and predictions meet what others measured."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from splitray.arch import ModelArch
from splitray.catalog import ARCHITECTURES, DEVICES, LINKS, Mark, Value, architecture, device_values
from splitray.cost import CostModel
from splitray.errors import ModelError, TopologyError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import ClusterState, make_planner
from splitray.topology import Device, DeviceId, Link, Topology

Q4_K_M, Q4_0 = 4.85, 4.5  # mean bits of a weight with its scales
LLAMA_3_1_8B = replace(architecture("llama-3-8b"), weight_bits=Q4_K_M)
LLAMA_3_2_3B = ModelArch(
    name="llama-3.2-3b", num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, hidden_dim=3072, ffn_dim=8192,
    vocab=128256, context_tokens=8192, tied_embeddings=True, dtype="float16", weight_bits=Q4_K_M,
)  # fmt: skip
TINYLLAMA = ModelArch(
    name="tinyllama-1.1b", num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64, hidden_dim=2048, ffn_dim=5632,
    vocab=32000, context_tokens=2048, dtype="float16", weight_bits=Q4_0,
)  # fmt: skip
SMOLLM2 = ModelArch(
    name="smollm2-1.7b", num_layers=24, num_heads=32, num_kv_heads=32, head_dim=64, hidden_dim=2048, ffn_dim=8192,
    vocab=49152, context_tokens=2048, tied_embeddings=True, dtype="float16", weight_bits=Q4_0,
)  # fmt: skip


def test_every_value_has_a_mark_and_a_source() -> None:
    known = {f.name for f in fields(Device)}
    required = {"memory_bytes", "compute_flops", "memory_bandwidth_bytes_per_s", "idle_w", "active_w"}
    assert set(DEVICES) == {
        "jetson-orin-nx-16gb", "jetson-orin-nx-8gb", "galaxy-s23", "raspberry-pi-4", "raspberry-pi-5", "a100-80gb",
        "h100-80gb", "x86-core",
    }  # fmt: skip
    for name, values in {**DEVICES, **LINKS}.items():
        for key, value in values.items():
            assert isinstance(value, Value) and value.value > 0, (name, key)
            assert value.mark in get_args(Mark) and len(value.source) > 3, (name, key)
    for name, values in DEVICES.items():
        assert required <= set(values) <= known, name
        assert values["idle_w"].value < values["active_w"].value
    for values in LINKS.values():
        assert {"uplink_bytes_per_s", "downlink_bytes_per_s", "rtt_s"} <= set(values)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_decoders_are_in_bfloat16_unless_told(name: str) -> None:
    assert (architecture(name).dtype, architecture(name, dtype="float32").dtype) == ("bfloat16", "float32")


def test_an_unknown_decoder_is_refused_with_a_hint() -> None:
    with pytest.raises(ModelError, match=r"expected one of gpt2-xl.*did you mean llama-7b\?"):
        architecture("lama-7b")


def test_a_topology_file_may_name_devices_and_links(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        """
        devices:
          - {id: pi, tier: edge, catalog: raspberry-pi-5, memory_bytes: 4e9}
          - {id: gpu, tier: cloud, catalog: a100-80gb}
        links: [{between: [pi, gpu], catalog: lte, rtt_s: 0.05}]
        """
    )
    where = Topology.load(path)
    assert where.devices[0].memory_bytes == 4e9
    assert where.devices[1].memory_bandwidth_bytes_per_s == device_values("a100-80gb")["memory_bandwidth_bytes_per_s"]
    up, down = where.link(DeviceId("pi"), DeviceId("gpu")), where.link(DeviceId("gpu"), DeviceId("pi"))
    assert up and down
    assert up.bandwidth_bytes_per_s == 7.9e6 / 8 < down.bandwidth_bytes_per_s
    assert up.rtt_s == 0.05
    path.write_text(path.read_text().replace("catalog: lte", "catalog: lt"))
    with pytest.raises(TopologyError, match=r"links\[0\].catalog.*did you mean lte\?"):
        Topology.load(path)


def tokens_per_s(device: str, arch: ModelArch, *, context: int = 128, prompt: int | None = None) -> float:
    values = {**device_values(device), "memory_bytes": 1e12}
    only = Device(id=DeviceId("d"), tier="edge", **values)  # type: ignore[arg-type]
    where = Topology(devices=(only,), links=(), origin=only.id)
    placement = make_planner("best_device").propose(ClusterState(arch=arch, topology=where))
    model = CostModel(arch, where)
    if prompt:
        return prompt / model.ttft_s(placement, prompt_tokens=prompt)
    return 1 / model.tpot_s(placement, context_tokens=context)


# Measured by others, batch 1; a band where sources disagree. Sources: geerlingguy/ai-benchmarks @ bdf9441 (Pi 5), the
# vendor's container README and public llama.cpp reports (Orin NX), llama.rn (Galaxy S23).
@pytest.mark.parametrize(
    ("device", "arch", "low", "high"),
    [
        ("raspberry-pi-5", LLAMA_3_2_3B, 4.61, 4.61),
        ("raspberry-pi-5", LLAMA_3_1_8B, 2.17, 2.17),
        ("raspberry-pi-5", replace(architecture("llama-13b"), weight_bits=Q4_K_M), 1.36, 1.36),
        ("jetson-orin-nx-8gb", replace(architecture("llama-7b"), weight_bits=Q4_0), 5, 7),
        ("jetson-orin-nx-8gb", TINYLLAMA, 22, 27),
        ("jetson-orin-nx-16gb", LLAMA_3_2_3B, 13.6, 27.2),
        ("galaxy-s23", SMOLLM2, 16.6, 20.9),
        ("raspberry-pi-4", replace(architecture("llama-7b"), weight_bits=Q4_0), 1 / 1.3125, 1 / 1.3125),
    ],
)
def test_decoding_meets_the_measured_bands(device: str, arch: ModelArch, low: float, high: float) -> None:
    assert 0.75 * low <= tokens_per_s(device, arch) <= 1.25 * high


def test_a_phone_reads_prompts_within_its_measured_band() -> None:
    assert 110.2 <= tokens_per_s("galaxy-s23", SMOLLM2, prompt=256) <= 459.9


def test_four_boards_over_ethernet_are_faster_than_two_and_eight_slower_than_four() -> None:
    """README of b4rtaz/distributed-llama @ dddeb12: 1312.5, 793.69, 494.00, 588.19 ms a token on 1, 2, 4, 8 nodes."""
    arch = replace(architecture("llama-7b"), weight_bits=Q4_0)
    board: dict[str, Any] = {**device_values("raspberry-pi-4"), "memory_bytes": 1e12}
    wire = {k: v.value for k, v in LINKS["gigabit-lan"].items()}
    predicted = {}
    for nodes in (1, 2, 4, 8):
        devices = tuple(Device(id=DeviceId(f"pi{i}"), tier="edge", **board) for i in range(nodes))
        links = tuple(
            Link(source=a.id, target=b.id, bandwidth_bytes_per_s=wire["uplink_bytes_per_s"], rtt_s=wire["rtt_s"],
                 exchange_s=wire["exchange_s"])
            for a in devices for b in devices if a is not b
        )  # fmt: skip
        where = Topology(devices=devices, links=links, origin=devices[0].id)

        def even(total: int, ids: tuple[DeviceId, ...] = where.ids) -> Shares:
            edges = [total * i // len(ids) for i in range(len(ids) + 1)]
            return Shares.of({d: [(edges[i], edges[i + 1])] for i, d in enumerate(ids)})

        layer = LayerPlacement(even(arch.num_kv_heads), even(arch.ffn_dim))
        placement = Placement((layer,) * arch.num_layers, (devices[0].id,), even(arch.vocab))
        predicted[nodes] = 1e3 * CostModel(arch, where).tpot_s(placement, context_tokens=128)
    assert predicted[4] < predicted[2] < predicted[1]
    assert predicted[8] > predicted[4]
    for nodes, measured in ((1, 1312.5), (2, 793.69), (4, 494.0), (8, 588.19)):
        assert predicted[nodes] == pytest.approx(measured, rel=0.25), predicted
