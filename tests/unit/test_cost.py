"""The cost model: closed forms, the numbers of docs/equations.md E1.T, and an event simulation of the clocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.cost import CostModel, Load, Rates, load_of, memory_bytes, step_cost, work_s
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import ClusterState, make_planner
from splitray.route import compile_route, message_bytes
from splitray.topology import Device, DeviceId, Link, Topology

LLAMA_7B = ModelArch(
    name="llama-7b", num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, hidden_dim=4096, ffn_dim=11008,
    vocab=32000, context_tokens=4096, dtype="bfloat16",
)  # fmt: skip
LLAMA_3_8B = replace(LLAMA_7B, name="llama-3-8b", num_kv_heads=8, ffn_dim=14336, vocab=128256)
GPT2_XL = ModelArch(
    name="gpt2-xl", num_layers=48, num_heads=25, num_kv_heads=25, head_dim=64, hidden_dim=1600, ffn_dim=6400,
    vocab=50257, context_tokens=1024, ffn_matrices=2, tied_embeddings=True, dtype="bfloat16",
)  # fmt: skip
LLAMA_13B = replace(
    LLAMA_7B, name="llama-13b", num_layers=40, num_heads=40, num_kv_heads=40, hidden_dim=5120, ffn_dim=13824
)
SMALL = ModelArch(
    name="small", num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, hidden_dim=128, ffn_dim=256, vocab=512,
    context_tokens=256,
)  # fmt: skip


def topology(num_devices: int, rng: np.random.Generator, *, media: int = 0) -> Topology:
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"),
            tier="edge" if i % 2 == 0 else "cloud",
            memory_bytes=1e12,
            launch_s=rng.uniform(0, 1e-4),
            compute_flops=rng.uniform(1e9, 1e11),
            memory_bandwidth_bytes_per_s=rng.uniform(1e9, 1e11),
            idle_w=rng.uniform(0, 3),
            active_w=rng.uniform(3, 9),
            radio_w=rng.uniform(0, 1),
        )
        for i in range(num_devices)
    )
    links = tuple(
        Link(
            source=a.id, target=b.id, bandwidth_bytes_per_s=rng.uniform(1e5, 1e8), rtt_s=rng.uniform(1e-4, 1e-2),
            exchange_s=rng.uniform(0, 1e-4), medium=f"m{rng.integers(media)}" if media and rng.random() < 0.7 else None,
        )
        for a in devices for b in devices if a is not b
    )  # fmt: skip
    return Topology(devices=devices, links=links, origin=devices[0].id)


def clocks(placement: Placement, arch: ModelArch, where: Topology, context: int) -> dict[str, float]:
    """The rule by hand, one message at a time, in seconds."""
    route = compile_route(placement, arch, where)
    load, ids = load_of(placement, arch, where), where.ids
    work = work_s(load, Rates.of(where), context_tokens=context)[0]
    clock = dict.fromkeys(ids, 0.0)
    for stage, block in enumerate([*route.sub_blocks, None]):
        for i, d in enumerate(ids):
            clock[d] += work[stage, i]
        arrival, downlink = dict(clock), defaultdict[str, float](float)
        uplink: dict[str, float] = {}
        medium: dict[str, float] = {}
        after = route.sub_blocks[-1].index + 1 if block is None else block.index
        messages = route.boundary(after).messages
        for m in sorted(messages, key=lambda m: (ids.index(m.source), ids.index(m.target))):
            link = where.link(m.source, m.target)
            assert link is not None
            busy = link.exchange_s + message_bytes(m, arch) / link.bandwidth_bytes_per_s
            if link.medium is None:
                start = uplink.get(m.source, clock[m.source])
                end = uplink[m.source] = start + busy
            else:
                start = max(clock[m.source], medium.get(link.medium, 0.0))
                end = medium[link.medium] = start + busy
            end = max(end, downlink[m.target] + busy if downlink[m.target] else end)
            downlink[m.target] = end
            arrival[m.target] = max(arrival[m.target], end + link.rtt_s / 2)
        clock = arrival
    return {str(d): t for d, t in clock.items()}


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", range(60))
def test_clocks_equal_a_scalar_simulation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    where = topology(int(rng.integers(1, 6)), rng)
    placement = make_planner("random", seed=seed).propose(ClusterState(arch=SMALL, topology=where))
    step = CostModel(SMALL, where).decode(placement, context_tokens=40)
    expected = clocks(placement, SMALL, where, 40)
    assert step.origin_s[0] == pytest.approx(expected[where.origin])
    assert step.cycle_s[0] == pytest.approx(max(expected[d] for d in placement.embedding))


def test_a_shared_medium_is_never_quicker_and_one_cell_serialises_all() -> None:
    rng = np.random.default_rng(5)
    apart = topology(4, rng)
    cell = replace(apart, links=tuple(replace(x, medium="wifi") for x in apart.links))
    state = ClusterState(arch=SMALL, topology=apart)
    even = make_planner("even").propose(state)
    fast, slow = (CostModel(SMALL, t).tpot_s(even, context_tokens=1) for t in (apart, cell))
    assert slow > fast
    route = compile_route(even, SMALL, cell)
    on_air = sum(
        message_bytes(m, SMALL) / link.bandwidth_bytes_per_s
        for b in route.boundaries for m in b.messages if (link := cell.link(m.source, m.target))
    )  # fmt: skip
    assert slow >= on_air


@pytest.mark.parametrize("seed", range(10))
def test_media_equal_a_scalar_simulation(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    where = topology(3, rng, media=1)
    one_cell = replace(where, links=tuple(replace(x, medium="m0") for x in where.links))
    placement = make_planner("random", seed=seed).propose(ClusterState(arch=SMALL, topology=one_cell))
    step = CostModel(SMALL, one_cell).decode(placement, context_tokens=7)
    assert step.origin_s[0] == pytest.approx(clocks(placement, SMALL, one_cell, 7)[one_cell.origin])


def test_stacked_instances_cost_what_each_costs_alone() -> None:
    rng = np.random.default_rng(3)
    where = topology(3, rng)
    planner = make_planner("random", seed=3)
    placements = [planner.propose(ClusterState(arch=SMALL, topology=where)) for _ in range(16)]
    loads = Load.stack([load_of(p, SMALL, where) for p in placements])
    context = rng.integers(1, 200, 16).astype(float)
    together = step_cost(loads, Rates.of(where), context_tokens=context)
    for i, placement in enumerate(placements):
        alone = CostModel(SMALL, where).decode(placement, context_tokens=context[i])
        assert together.cycle_s[i] == pytest.approx(alone.cycle_s[0])
        np.testing.assert_allclose(together.busy_s[i], alone.busy_s[0])
        assert together.sent_bytes[i].sum() == compile_route(placement, SMALL, where).bytes_per_token(SMALL)
    picked = step_cost(loads.take([2, 5]), Rates.of(where), context_tokens=context[[2, 5]])
    np.testing.assert_allclose(picked.cycle_s, together.cycle_s[[2, 5]])


@pytest.mark.parametrize(
    ("arch", "head", "ffn", "kv_token", "params"),
    [
        (GPT2_XL, 409_600, 20_480_000, 307_200, 1.555e9),
        (LLAMA_7B, 2_097_152, 135_266_304, 524_288, 6.738e9),
        (LLAMA_13B, 2_621_440, 212_336_640, 819_200, 13.015e9),
        (LLAMA_3_8B, 1_310_720, 176_160_768, 131_072, 8.030e9),
    ],
)
def test_vectors_of_the_specification(arch: ModelArch, head: int, ffn: int, kv_token: int, params: float) -> None:
    where = Topology.uniform(1)
    placement = make_planner("best_device").propose(ClusterState(arch=arch, topology=where))
    load = load_of(placement, arch, where)
    attention, columns = load.weight_bytes[0, 1, 0], load.weight_bytes[0, 2, 0]
    assert attention == head * arch.num_heads * arch.dtype_bytes  # a query head's share, 1.8
    assert columns == ffn * arch.dtype_bytes  # 1.9
    assert load.kv_bytes.sum() == kv_token  # 1.11
    assert load.flops[0, 2, 0] == 2 * ffn  # 1.3, 1.4
    assert load.flops[0, 1, 0] == 2 * head * arch.num_heads  # 1.1
    assert load.attention_flops[0, 1, 0] == 4 * arch.num_heads * arch.head_dim  # 1.2
    assert arch.num_params == pytest.approx(params, rel=1e-3)
    assert memory_bytes(placement, arch, 2048)[where.origin] == arch.num_params * 2 + 2048 * kv_token


def test_a_layer_of_a_plain_mlp_has_the_flops_of_megatron() -> None:
    """Equation 1.6: 24 n d^2 + 4 n c d with d_ff = 4 d."""
    where, d, context = Topology.uniform(1), GPT2_XL.hidden_dim, 100
    load = load_of(make_planner("best_device").propose(ClusterState(arch=GPT2_XL, topology=where)), GPT2_XL, where)
    layer = load.flops[0, 1:3, 0].sum() + load.attention_flops[0, 1:3, 0].sum() * context
    assert layer == 24 * d**2 + 4 * context * d


def test_one_device_reads_its_weights_and_cache_at_its_memory_bandwidth() -> None:
    """docs/equations.md E1.T: LLaMA-7B in fp16 takes 131.6 ms a token on an Orin NX at best, 6.61 on an A100."""
    for bandwidth, expected_ms in ((102.4e9, 131.6), (2039e9, 6.61)):
        device = Device(
            id=DeviceId("d"), tier="edge", memory_bytes=1e12, compute_flops=1e15, memory_bandwidth_bytes_per_s=bandwidth
        )
        where = Topology(devices=(device,), links=(), origin=device.id)
        placement = make_planner("best_device").propose(ClusterState(arch=LLAMA_7B, topology=where))
        rows = LLAMA_7B.vocab * LLAMA_7B.hidden_dim * 2 / bandwidth  # the vector counts the embedding's read too
        tpot_s = CostModel(LLAMA_7B, where).tpot_s(placement, context_tokens=0)
        assert 1e3 * (tpot_s + rows) == pytest.approx(expected_ms, rel=1e-3)
        assert CostModel(LLAMA_7B, where).tpot_s(placement, context_tokens=100) - tpot_s == pytest.approx(
            100 * 524_288 / bandwidth
        )


def test_flops_only_time_is_the_papers_and_below_the_roofline() -> None:
    rng = np.random.default_rng(2)
    where = topology(1, rng)
    placement = make_planner("best_device").propose(ClusterState(arch=SMALL, topology=where))
    device = where.devices[0]
    layers = 2 * (SMALL.num_params - 2 * SMALL.vocab * SMALL.hidden_dim)
    attention = 4 * SMALL.num_layers * SMALL.num_heads * SMALL.head_dim * 10
    flops = layers + attention + 2 * SMALL.vocab * SMALL.hidden_dim
    only = CostModel(SMALL, where, time_model="flops").tpot_s(placement, context_tokens=10)
    assert only == pytest.approx(flops / device.compute_flops)
    assert CostModel(SMALL, where).tpot_s(placement, context_tokens=10) >= only


def test_a_prompt_multiplies_the_work_and_the_payload_but_not_the_head() -> None:
    where = topology(2, np.random.default_rng(8))
    placement = make_planner("even").propose(ClusterState(arch=SMALL, topology=where))
    load, rates = load_of(placement, SMALL, where), Rates.of(where)
    one = step_cost(load, rates, context_tokens=1, time_model="flops")
    many = step_cost(load, rates, context_tokens=64, new_tokens=64, time_model="flops")
    hidden = SMALL.hidden_dim * 4
    into_head = 2 * hidden
    ends = one.sent_bytes.sum() - into_head - hidden * (4 * SMALL.num_layers - 1)
    assert many.sent_bytes.sum() == 64 * hidden * (4 * SMALL.num_layers - 1) + into_head + ends
    assert many.busy_s.sum() < 64 * (one.busy_s.sum() + 64 * load.attention_flops.sum() / rates.flops_per_s.min())


def test_a_gigabyte_over_eight_gigabits_takes_a_second_and_the_latency() -> None:
    """Bytes over bytes a second (docs/equations.md E1.15), not over bits: eight times too quick."""
    link = Link(source=DeviceId("a"), target=DeviceId("b"), bandwidth_bytes_per_s=8e9 / 8, rtt_s=0.02, exchange_s=0.003)
    assert link.transfer_s(1e9) == pytest.approx(1.013)


def test_a_free_model_partitioned_throughout_takes_a_round_trip_a_layer() -> None:
    """Of the 2 L + 1 exchanges from the embedding to the head on one device, 2 L are waited for."""
    fast = Topology.uniform(2)
    rtt = 0.01
    where = replace(
        fast,
        devices=tuple(replace(d, compute_flops=1e30, memory_bandwidth_bytes_per_s=1e30) for d in fast.devices),
        links=tuple(replace(x, rtt_s=rtt, bandwidth_bytes_per_s=1e30) for x in fast.links),
    )
    a, b = where.ids
    halves = LayerPlacement(Shares.of({a: [(0, 2)], b: [(2, 4)]}), Shares.of({a: [(0, 128)], b: [(128, 256)]}))
    placement = Placement((halves,) * SMALL.num_layers, (a,), Shares.whole(SMALL.vocab, a))
    assert compile_route(placement, SMALL, where).exchanges_per_token == 2 * SMALL.num_layers + 1
    assert CostModel(SMALL, where).tpot_s(placement, context_tokens=1) == pytest.approx(SMALL.num_layers * rtt)


def test_tokens_stream_back_off_the_critical_path() -> None:
    where = topology(2, np.random.default_rng(1))
    cloud = make_planner("cloud_only").propose(ClusterState(arch=SMALL, topology=where))
    step = CostModel(SMALL, where).decode(cloud, context_tokens=1)
    link = where.link(where.ids[1], where.ids[0])
    assert link is not None
    assert step.origin_s[0] - step.cycle_s[0] == pytest.approx(link.transfer_s(4))


def test_energy_has_idle_active_and_radio_parts() -> None:
    where = topology(2, np.random.default_rng(4))
    placement = make_planner("even").propose(ClusterState(arch=SMALL, topology=where))
    step = CostModel(SMALL, where).decode(placement, context_tokens=5)
    sent = step.sent_bytes[0] / np.array(
        [[1, where.links[0].bandwidth_bytes_per_s], [where.links[1].bandwidth_bytes_per_s, 1]]
    )
    for i, d in enumerate(where.devices):
        expected = d.idle_w * step.cycle_s[0] + (d.active_w - d.idle_w) * step.busy_s[0, i] + d.radio_w * sent.sum()
        assert step.energy_j(where)[0, i] == pytest.approx(expected)


def test_an_outage_takes_for_ever() -> None:
    where = topology(2, np.random.default_rng(6))
    placement = make_planner("even").propose(ClusterState(arch=SMALL, topology=where))
    rates = Rates.of(where)
    down = replace(rates, link_bytes_per_s=np.zeros_like(rates.link_bytes_per_s))
    assert np.isinf(step_cost(load_of(placement, SMALL, where), down, context_tokens=1).cycle_s[0])


def test_instances_side_by_side_do_not_take_each_others_turn_on_a_medium() -> None:
    where = topology(4, np.random.default_rng(3), media=1)
    placements = [make_planner("random", seed=s).propose(ClusterState(arch=SMALL, topology=where)) for s in range(12)]
    loads = [load_of(p, SMALL, where) for p in placements]
    together = step_cost(Load.stack(loads), Rates.of(where), context_tokens=9).cycle_s
    alone = [float(step_cost(x, Rates.of(where), context_tokens=9).cycle_s[0]) for x in loads]
    assert together == pytest.approx(alone, rel=1e-12)
