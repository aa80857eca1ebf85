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
from splitray.planners.layer_dp import Chain, best_shards, caps
from splitray.planners.layer_times import LayerTimes, layer_times
from splitray.planners.memory import layer_bytes, needed_bytes, shortfall, table_bytes
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
            memory_bytes=2 * int(table_bytes(state)[0]) + rng.uniform(*layers) * int(layer_bytes(state)[0]),
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


def brute_force(times: LayerTimes, state: ClusterState, *, throughput: bool, paper: bool) -> float:
    """Every assignment of layers to devices in contiguous shards, one a device; the ends anywhere or as printed."""
    num_devices, best = len(state.topology.ids), float("inf")
    every = range(num_devices)
    for layers in itertools.product(every, repeat=state.arch.num_layers):
        runs = [(d, len(list(g))) for d, g in itertools.groupby(layers)]
        if len({d for d, _ in runs}) != len(runs):
            continue
        for e, h in [(0, layers[-1])] if paper else itertools.product(every, every):
            limits = caps(state, list(every), e, h)
            if limits is None or any(n > limits[d] for d, n in runs):
                continue
            stages = chain_stages(times, Chain(e, list(layers), h))
            best = min(best, max(stages) if throughput else sum(stages))
    return best


def chain_stages(times: LayerTimes, chain: Chain) -> list[float]:
    """Seconds of every shard and transfer, of the head, and of the way of the token."""
    runs = [(d, len(list(g))) for d, g in itertools.groupby(chain.layers)]
    stops = [chain.embedding, *(d for d, _ in runs), chain.head]
    moves = [times.state_s[a, b] for a, b in itertools.pairwise(stops)]
    return [
        *(n * times.layer_s[d] for d, n in runs), *moves, times.head_s[chain.head],
        times.token_s[chain.head, chain.embedding],
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["", "throughput", "paper", "paper_throughput"])
@pytest.mark.parametrize("seed", range(12))
def test_edgeshard_equals_brute_force(seed: int, variant: str) -> None:
    rng = np.random.default_rng(seed)
    where = cluster(int(rng.integers(2, 5)), rng, layers=(1, 5))
    state = ClusterState(arch=replace(ARCH, num_layers=4), topology=where, context_tokens=16)
    times, throughput, paper = layer_times(state), "throughput" in variant, "paper" in variant
    best = brute_force(times, state, throughput=throughput, paper=paper)
    found = best_shards(times, state, list(range(len(where.ids))), throughput=throughput, paper=paper)
    if found is None:
        assert np.isinf(best)
        return
    assert (max if throughput else sum)(chain_stages(times, found)) == pytest.approx(best)
    placement = make_planner(f"layer_dp:{variant}" if variant else "layer_dp").propose(state)
    layers = [where.ids.index(x.ffn.devices[0]) for x in placement.layers]
    proposed = Chain(where.ids.index(placement.embedding[0]), layers, where.ids.index(placement.head.devices[0]))
    assert (max if throughput else sum)(chain_stages(times, proposed)) == pytest.approx(best)
    assert not shortfall(placement, state)


@pytest.mark.parametrize("seed", range(12))
def test_of_shards_with_the_shortest_slowest_stage_the_quickest_chain_is_taken(seed: int) -> None:
    rng = np.random.default_rng(seed)
    where = cluster(3, rng, layers=(1, 5))
    state = ClusterState(arch=replace(ARCH, num_layers=4), topology=where, context_tokens=16)
    times = layer_times(state)
    found = best_shards(times, state, [0, 1, 2], throughput=True)
    if found is None:
        return
    most, total = max(chain_stages(times, found)), sum(chain_stages(times, found))
    for layers in itertools.product(range(3), repeat=4):
        if len({d for d, _ in itertools.groupby(layers)}) != len(list(itertools.groupby(layers))):
            continue
        for e, h in itertools.product(range(3), repeat=2):
            limits = caps(state, [0, 1, 2], e, h)
            if limits is not None and all(layers.count(d) <= limits[d] for d in layers):
                stages = chain_stages(times, Chain(e, list(layers), h))
                assert max(stages) > most * (1 - 1e-8)
                assert max(stages) > most * (1 + 1e-8) or sum(stages) > total * (1 - 1e-8)


def test_the_additive_view_of_whole_layers_is_the_clocks() -> None:
    """Also with ends on other devices than the origin, which is told each token first or last."""
    where = cluster(3, np.random.default_rng(0))
    state = ClusterState(arch=ARCH, topology=where, context_tokens=16, codec="int8")
    times_of = [layer_times(replace(state, topology=replace(where, origin=o))) for o in where.ids]
    for layers in itertools.product(range(3), repeat=3):
        for e, h, o in itertools.product(range(3), repeat=3):
            here = replace(state, arch=replace(ARCH, num_layers=3), topology=replace(where, origin=where.ids[o]))
            placement = layers_on([where.ids[d] for d in layers], where.ids[e], where.ids[h], here)
            exact = CostModel(here.arch, here.topology, codec=here.codec).tpot_s(placement, context_tokens=16)
            assert times_of[o].chain_s(e, layers, h) == pytest.approx(exact, rel=1e-12)


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
    chosen = model.tpot_s(make_planner("layer_cut:paper").propose(state), context_tokens=16)
    assert chosen == pytest.approx(min(every.values()))
    fixed = model.tpot_s(make_planner("static_cut:paper").propose(state), context_tokens=16)
    assert fixed == pytest.approx(min(t for (p, _), t in every.items() if 0 < p < ARCH.num_layers))


@pytest.mark.parametrize("pins", ["none", "embedding", "embedding_and_head"])
@pytest.mark.parametrize("seed", range(12))
def test_a_freed_cut_is_the_best_between_any_two_pieces_and_devices_that_fits(seed: int, pins: str) -> None:
    rng = np.random.default_rng(seed)
    where = replace(cluster(3, rng, layers=(0, 7)), origin_holds=pins)  # type: ignore[arg-type]
    state = ClusterState(arch=ARCH, topology=where, context_tokens=16)
    model, total = CostModel(ARCH, where), ARCH.num_layers
    every = []
    for a, b in itertools.product(where.ids, repeat=2):
        for cut in range(-1, total + 2):  # before the embedding, after it and so many layers, after the head
            layers = [a] * max(0, cut) + [b] * (total - max(0, cut))
            placement = layers_on(layers[:total], b if cut < 0 else a, a if cut > total else b, state)
            if not shortfall(placement, state):
                every.append(model.tpot_s(placement, context_tokens=16))
    for name in ("layer_cut", "static_cut"):
        if not every:
            with pytest.raises(PlacementError, match="on either side of one cut"):
                make_planner(name).propose(state)
            continue
        chosen = make_planner(name).propose(state)
        assert model.tpot_s(chosen, context_tokens=16) == pytest.approx(min(every))


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
