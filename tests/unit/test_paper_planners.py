"""Layer-wise planners of the literature: equal to brute force in their own action spaces, and what each does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.errors import PlacementError
from splitray.planners import ClusterState, make_planner
from splitray.planners.layer_dp import best_shards, caps
from splitray.planners.layer_times import LayerTimes, layer_bytes, layer_times, table_bytes
from splitray.planners.memory import needed_bytes
from splitray.planners.ucb import Ucb
from splitray.planners.whole import layers_on
from splitray.route import compile_route
from splitray.topology import Device, DeviceId, Link, Topology

ARCH = ModelArch(
    name="toy", num_layers=5, num_heads=8, num_kv_heads=4, head_dim=8, hidden_dim=64, ffn_dim=96, vocab=128,
    context_tokens=256,
)  # fmt: skip


def cluster(num_devices: int, rng: np.random.Generator, *, layers: tuple[float, float] = (20, 20)) -> Topology:
    """Devices with room for so many layers beside two tables, drawn uniformly."""
    state = ClusterState(arch=ARCH, topology=Topology.uniform(1), context_tokens=16)
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"),
            tier="edge" if i == 0 else "cloud",
            memory_bytes=2 * table_bytes(state) + rng.uniform(*layers) * layer_bytes(state),
            compute_flops=1e12,
            memory_bandwidth_bytes_per_s=rng.uniform(1e8, 1e9),
        )
        for i in range(num_devices)
    )
    links = tuple(
        Link(source=a.id, target=b.id, bandwidth_bytes_per_s=rng.uniform(1e5, 1e7), rtt_s=rng.uniform(1e-5, 1e-3))
        for a in devices
        for b in devices
        if a is not b
    )
    return Topology(devices=devices, links=links, origin=devices[0].id)


def brute_force(times: LayerTimes, state: ClusterState, *, throughput: bool) -> float:
    """Every assignment of layers to devices in contiguous shards, one a device."""
    num_devices, best = len(state.topology.ids), float("inf")
    for layers in itertools.product(range(num_devices), repeat=state.arch.num_layers):
        runs = [(d, len(list(g))) for d, g in itertools.groupby(layers)]
        if len({d for d, _ in runs}) != len(runs):
            continue
        fits = all(n <= caps(state, d)[0] for d, n in runs) and runs[-1][1] <= caps(state, runs[-1][0])[1]
        if not fits:
            continue
        last = runs[-1][0]
        stages = [n * times.layer_s[d] for d, n in runs] + [times.head_s[last], times.token_s[last, 0]]
        stops = [0, *(d for d, _ in runs)]
        stages += [times.state_s[a, b] for a, b in zip(stops, stops[1:], strict=False)]
        best = min(best, max(stages) if throughput else sum(stages))
    return best


@pytest.mark.parametrize("throughput", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_edgeshard_equals_brute_force(seed: int, throughput: bool) -> None:
    rng = np.random.default_rng(seed)
    where = cluster(int(rng.integers(2, 5)), rng, layers=(1, 5))
    state = ClusterState(arch=ARCH, topology=where, context_tokens=16)
    times = layer_times(state)
    best = brute_force(times, state, throughput=throughput)
    found = best_shards(times, state, list(range(len(where.ids))), throughput=throughput)
    if found is None:
        assert np.isinf(best)
        return
    runs = [(d, len(list(g))) for d, g in itertools.groupby(found)]
    stages = [n * times.layer_s[d] for d, n in runs] + [times.head_s[found[-1]], times.token_s[found[-1], 0]]
    stages += [times.state_s[a, b] for a, b in zip([0, *found], found, strict=False) if a != b]
    assert (max if throughput else sum)(stages) == pytest.approx(best)
    placement = make_planner("layer_dp:throughput" if throughput else "layer_dp").propose(state)
    assert placement == layers_on([where.ids[d] for d in found], where.origin, where.ids[found[-1]], state)


def test_the_additive_view_of_whole_layers_is_the_clocks() -> None:
    rng = np.random.default_rng(0)
    where = cluster(3, rng)
    state = ClusterState(arch=ARCH, topology=where, context_tokens=16)
    times = layer_times(state)
    for layers in itertools.product(range(3), repeat=ARCH.num_layers):
        placement = layers_on([where.ids[d] for d in layers], where.origin, where.ids[2], state)
        exact = CostModel(ARCH, where).tpot_s(placement, context_tokens=16)
        assert times.chain_s(0, layers, 2) == pytest.approx(exact)


@pytest.mark.parametrize("pins", ["none", "embedding", "embedding_and_head"])
@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_cut_is_the_best_of_all_cuts(seed: int, pins: str) -> None:
    rng = np.random.default_rng(seed)
    where = replace(cluster(3, rng), origin_holds=pins)  # type: ignore[arg-type]
    state = ClusterState(arch=ARCH, topology=where, context_tokens=16)
    model, edge = CostModel(ARCH, where), where.ids[0]

    def tpot_s(cut: int, cloud: DeviceId) -> float:
        layers = [edge] * cut + [cloud] * (ARCH.num_layers - cut)
        return model.tpot_s(layers_on(layers, layers[0], layers[-1], state), context_tokens=16)

    every = {(p, c): tpot_s(p, c) for p in range(ARCH.num_layers + 1) for c in where.ids[1:]}
    chosen = model.tpot_s(make_planner("layer_cut").propose(state), context_tokens=16)
    assert chosen == pytest.approx(min(every.values()))
    fixed = model.tpot_s(make_planner("static_cut").propose(state), context_tokens=16)
    assert fixed == pytest.approx(min(t for (p, _), t in every.items() if 0 < p < ARCH.num_layers))


def test_a_static_cut_is_decided_from_the_average_and_not_the_present() -> None:
    rng = np.random.default_rng(1)
    now = cluster(2, rng)
    now = replace(now, devices=(now.devices[0], replace(now.devices[1], memory_bandwidth_bytes_per_s=1e10)))
    slow = replace(now, devices=(now.devices[0], replace(now.devices[1], memory_bandwidth_bytes_per_s=1e6)))
    decided = make_planner("static_cut").propose(ClusterState(arch=ARCH, topology=slow, average=now))
    assert decided == make_planner("static_cut").propose(ClusterState(arch=ARCH, topology=now))
    assert decided != make_planner("static_cut").propose(ClusterState(arch=ARCH, topology=slow))


def test_no_cut_that_fits_is_an_error_with_the_bytes() -> None:
    where = cluster(2, np.random.default_rng(2), layers=(1, 1.5))
    with pytest.raises(PlacementError, match=r"on either side of one cut.*bytes on d0"):
        make_planner("layer_cut").propose(ClusterState(arch=ARCH, topology=where))


def test_a_client_that_holds_the_loop_pays_a_round_trip_a_token() -> None:
    where = cluster(2, np.random.default_rng(3))
    state = ClusterState(arch=ARCH, topology=where)
    streamed, held = (make_planner(n).propose(state) for n in ("cloud_only", "cloud_only_rtt"))
    model = CostModel(ARCH, where)
    waits = sum(where.links[i].transfer_s(n) for i, n in ((0, 64 * 4), (1, 4)))
    assert model.tpot_s(held, context_tokens=1) - model.tpot_s(streamed, context_tokens=1) == pytest.approx(waits)
    assert compile_route(held, ARCH, where).exchanges_per_token == 2


def test_pieces_dealt_in_turn_are_spread_and_greedy_ones_are_not() -> None:
    where = cluster(4, np.random.default_rng(4))
    state = ClusterState(arch=ARCH, topology=where)
    dealt, greedy = (make_planner(n).propose(state) for n in ("round_robin", "greedy"))
    assert {layer.attention.count(d) for layer in dealt.layers for d in where.ids} == {1}
    assert len({d for layer in dealt.layers for d in layer.ffn.devices}) == 4
    fastest = max(where.devices, key=lambda d: d.memory_bandwidth_bytes_per_s).id
    assert greedy.devices == (fastest,)
    tight = cluster(4, np.random.default_rng(4), layers=(2, 2))
    state = replace(state, topology=tight)
    for name in ("round_robin", "greedy"):
        placement = make_planner(name).propose(state)
        assert len(placement.devices) > 1
        assert all(b <= tight.device(d).memory_bytes for d, b in needed_bytes(placement, state).items())


def test_tensor_parallel_shares_follow_the_priced_speed() -> None:
    rng = np.random.default_rng(5)
    where = cluster(2, rng)
    slow_start = replace(where, devices=(where.devices[0], replace(where.devices[1], launch_s=1.0)))
    state = ClusterState(arch=ARCH, topology=slow_start)
    priced, plain = (make_planner(n).propose(state) for n in ("tensor_parallel", "proportional"))
    slow = where.ids[1]
    assert priced.layers[0].ffn.count(slow) == 0 < plain.layers[0].ffn.count(slow)


def test_ucb_tries_every_device_and_settles_on_the_best() -> None:
    where = cluster(3, np.random.default_rng(6))
    state = ClusterState(arch=ARCH, topology=where)
    model, planner = CostModel(ARCH, where), Ucb(exploration=0.1)
    seen = []
    for _ in range(200):
        placement = planner.propose(state)
        tpot_s = model.tpot_s(placement, context_tokens=1)
        planner.observe(state, placement, tpot_s=tpot_s, energy_j_per_token=0.0)
        seen.append((tpot_s, placement.devices))
    assert {d for _, (d, *_) in seen} == set(where.ids)
    best = min(seen)[1]
    assert sum(d == best for _, d in seen[100:]) >= 90
