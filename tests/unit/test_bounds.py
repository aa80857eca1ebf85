"""What the planners of ours must and must not do: never behind the simple ones, and split only inside the bounds.

The bounds are those of two equal devices with links that cost latency r alone: C is the time that the L layers take on
one device, the head being left whole. Halving every layer is worth it against one device if r < C / (2L + 1), against
one cut if r < C / (2L - 1), with attention copied (its share of the time a) if r < (1 - a) C / (L + 1), and halving
the head alone if r < C_head / 2. Uneven shares gain a little more: a device that has its input earlier does more.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.catalog import architecture
from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import ClusterState, make_planner
from splitray.planners.exact import solve
from splitray.planners.memory import model_bytes
from splitray.planners.optimum.enumerate import by_counts
from splitray.planners.optimum.space import Space
from splitray.route import compile_route
from splitray.topology import Device, DeviceId, Link, Topology, parse_topology

LAYERS = 6


def toy(**more: object) -> ModelArch:
    values = dict(
        name="toy", num_layers=LAYERS, num_heads=8, num_kv_heads=8, head_dim=16, hidden_dim=128, ffn_dim=512,
        vocab=1000, context_tokens=256,
    )  # fmt: skip
    return ModelArch(**{**values, **more})  # type: ignore[arg-type]


def equal_pair(rtt_s: float, *, launch_s: float = 0.0, exchange_s: float = 0.0) -> Topology:
    device = Device(
        id=DeviceId("a"), tier="edge", memory_bytes=1e12, compute_flops=1e15, memory_bandwidth_bytes_per_s=1e8,
        launch_s=launch_s,
    )  # fmt: skip
    other = replace(device, id=DeviceId("b"), tier="cloud")
    links = tuple(
        Link(source=s, target=t, bandwidth_bytes_per_s=1e18, rtt_s=rtt_s, exchange_s=exchange_s)
        for s, t in ((device.id, other.id), (other.id, device.id))
    )
    return Topology(devices=(device, other), links=links, origin=device.id)


def splits(placement: Placement) -> dict[str, int]:
    """Layers whose attention is partitioned or copied, whose FFN is partitioned, and holders of the head."""
    layers = placement.layers
    shared = [x.attention for x in layers if len(x.attention.devices) > 1]
    copied = sum(x.is_replicated(8) for x in shared)
    return {
        "attention": len(shared) - copied,
        "copied": copied,
        "ffn": sum(len(x.ffn.devices) > 1 for x in layers),
        "head": len(placement.head.devices),
    }


def seconds(state: ClusterState, placement: Placement) -> float:
    cost = CostModel(state.arch, state.topology, codec=state.codec)
    return cost.tpot_s(placement, context_tokens=max(1, state.context_tokens))


def halves(arch: ModelArch, where: Topology, *, copied: bool = False, head: bool = False) -> Placement:
    """Halves of all layers with the head whole, or with their attention copied; or halves of the head alone."""
    ids = where.ids

    def half(total: int) -> Shares:
        return Shares.of({ids[0]: [(0, total // 2)], ids[1]: [(total // 2, total)]})

    def one(total: int) -> Shares:
        return Shares.whole(total, ids[0])

    groups, columns = arch.num_kv_heads, arch.ffn_dim
    attention = Shares.whole(groups, *ids) if copied else half(groups)
    layer = LayerPlacement(one(groups), one(columns)) if head else LayerPlacement(attention, half(columns))
    return Placement((layer,) * arch.num_layers, ids[:1], half(arch.vocab) if head else one(arch.vocab))


@pytest.mark.parametrize(("launch_s", "exchange_s"), [(0.0, 0.0), (2e-5, 1e-4)], ids=["free", "with fixed costs"])
def test_halves_break_even_one_hop_beyond_the_bounds(launch_s: float, exchange_s: float) -> None:
    """The bounds count barriers; by the clocks the device of the embedding begins at once, and one hop is hidden.

    With fixed costs: a launch is not divided, and a message's cost counts like as much latency each way.
    """
    arch = toy()

    def at(rtt_s: float) -> ClusterState:
        where = equal_pair(rtt_s - 2 * exchange_s, launch_s=launch_s, exchange_s=exchange_s)
        return ClusterState(arch=arch, topology=where, context_tokens=16)

    still = ClusterState(arch=arch, topology=equal_pair(0.0, launch_s=launch_s), context_tokens=16)
    one_s = seconds(still, make_planner("best_device").propose(still))
    head_s = arch.vocab * arch.weight_bytes(arch.vocab_row_params) / 1e8
    ffn_s = LAYERS * arch.ffn_dim * arch.weight_bytes(arch.ffn_unit_params) / 1e8
    layers_s = one_s - head_s - (2 * LAYERS + 1) * launch_s
    for placement, gain_s, hops in (
        (halves(arch, still.topology), layers_s, 2 * LAYERS + 1),
        (halves(arch, still.topology, copied=True), ffn_s, LAYERS + 1),
    ):
        assert seconds(at(gain_s / hops), placement) < one_s
        assert seconds(at(gain_s / (hops - 1)), placement) == pytest.approx(one_s, rel=1e-9)
    assert seconds(at(head_s / 2), halves(arch, still.topology, head=True)) == pytest.approx(one_s, rel=1e-9)
    state = at(layers_s / (2 * LAYERS - 2))
    cut = make_planner(f"fixed_cut:{LAYERS // 2}").propose(state)
    cut = replace(cut, head=Shares.whole(arch.vocab, state.topology.ids[0]))
    assert seconds(state, halves(arch, still.topology)) == pytest.approx(seconds(state, cut), rel=1e-9)


DEEP = 24
NEAR = 0.05  # shares that are not halves gain at the first and the last layer: the bounds move by about 1 / DEEP


@pytest.mark.thin(3)
@pytest.mark.parametrize("exchange_s", [0.0, 2e-4])
@pytest.mark.parametrize("ratio", [0.3, 0.8, 1 - NEAR, 1 + NEAR, 1.5, 4.0])
def test_exact_shares_layers_inside_the_bounds_only(ratio: float, exchange_s: float) -> None:
    arch = toy(num_layers=DEEP, vocab=16)
    still = ClusterState(arch=arch, topology=equal_pair(0.0), context_tokens=16)
    one_s = seconds(still, make_planner("best_device").propose(still))
    ffn_s = DEEP * arch.ffn_dim * arch.weight_bytes(arch.ffn_unit_params) / 1e8
    bound_s = ffn_s / (DEEP + 1)  # (1 - a) C / (L + 1), the widest of the bounds
    rtt_s = ratio * bound_s - 2 * exchange_s
    state = replace(still, topology=equal_pair(rtt_s, exchange_s=exchange_s))
    result = solve(state)
    found = splits(result.placement)
    if ratio > 1:
        assert found["attention"] == found["copied"] == found["ffn"] == 0
        assert result.tpot_s == pytest.approx(one_s)
        return
    assert found["ffn"] >= DEEP - 1
    assert result.tpot_s < one_s
    if (rtt_s + 2 * exchange_s) * (2 * DEEP + 1) > 1.05 * one_s:  # beyond the bound for every sub-block
        assert found["attention"] <= 1


@pytest.mark.parametrize(("ratio", "shares_layers"), [(0.8, True), (1 + NEAR, False)])
def test_exact_leaves_one_cut_inside_the_bounds_only(ratio: float, shares_layers: bool) -> None:
    """No device holds all, and there is next to no room for copies: attention whole, FFNs shared, or one cut."""
    arch = toy(num_layers=DEEP, vocab=16)
    still = ClusterState(arch=arch, topology=equal_pair(0.0), context_tokens=16)
    ffn_s = arch.ffn_dim * arch.weight_bytes(arch.ffn_unit_params) / 1e8
    where = equal_pair(ratio * ffn_s)
    devices = tuple(replace(d, memory_bytes=0.504 * model_bytes(still)) for d in where.devices)
    found = splits(solve(replace(still, topology=replace(where, devices=devices))).placement)
    if shares_layers:
        assert found["ffn"] >= DEEP // 3
    else:
        assert found["attention"] + found["copied"] + found["ffn"] <= 2


@pytest.mark.parametrize(("ratio", "holders"), [(0.9, 2), (2.2, 1)])
def test_the_head_is_treated_apart(ratio: float, holders: int) -> None:
    """Halves pay if r < C_head / 2, and uneven shares up to r < C_head; the layers stay whole."""
    arch = toy(num_layers=2, ffn_dim=8, vocab=4000)
    head_s = arch.vocab * arch.vocab_row_params * arch.dtype_bytes / 1e8
    state = ClusterState(arch=arch, topology=equal_pair(ratio * head_s / 2), context_tokens=16)
    assert splits(solve(state).placement) == {"attention": 0, "copied": 0, "ffn": 0, "head": holders}


def test_copied_attention_wins_and_both_planners_take_it() -> None:
    arch = toy(num_layers=2, num_heads=1, num_kv_heads=1, ffn_dim=768, vocab=30)
    pair = equal_pair(1e-3)
    third = replace(pair.devices[1], id=DeviceId("c"))
    devices = (*pair.devices, third)
    ffn_s = arch.ffn_dim * arch.weight_bytes(arch.ffn_unit_params) / 1e8
    links = tuple(
        Link(source=x.id, target=y.id, bandwidth_bytes_per_s=1e18, rtt_s=0.6 * ffn_s)
        for x, y in itertools.permutations(devices, 2)
    )
    state = ClusterState(
        arch=arch, topology=Topology(devices=devices, links=links, origin=devices[0].id), context_tokens=16
    )
    space, without = Space(state, blocks=3), Space(state, blocks=3)
    without.holdings = tuple(h for h in without.holdings if not h.replicated)
    best, best_without = by_counts(space), by_counts(without)
    assert best is not None
    assert best_without is not None
    assert best.tpot_s < 0.97 * best_without.tpot_s
    for name in ("exact", "drift_plus_penalty"):
        placement = make_planner(name).propose(state)
        assert any(len(x.attention.devices) > 1 for x in placement.layers), name
        assert seconds(state, placement) <= best.tpot_s * 1.02


@pytest.mark.thin(4)
@pytest.mark.parametrize("holds", ["none", "embedding", "embedding_and_head"])
@pytest.mark.parametrize("model", ["gpt2-xl", "llama-7b", "llama-13b"])
@pytest.mark.parametrize("link", ["lte", "wan"])
def test_far_from_the_cloud_the_best_placement_crosses_once_each_way(link: str, model: str, holds: str) -> None:
    state = ClusterState(
        arch=architecture(model),
        topology=Topology.pair("jetson-orin-nx-16gb", link=link, origin_holds=holds),
        context_tokens=512,
    )
    placement, best = (make_planner(name).propose(state) for name in ("drift_plus_penalty", "exact"))
    assert compile_route(placement, state.arch, state.topology).exchanges_per_token <= 2
    assert not any(len(x.attention.devices) + len(x.ffn.devices) > 2 for x in placement.layers)
    # a few columns computed while the last residual is on its way are worth microseconds
    assert 0.9999 * seconds(state, placement) <= seconds(state, best) <= seconds(state, placement)


@pytest.mark.parametrize(
    ("rtt_s", "memory_bytes", "mixes"),
    [(3e-4, 1e11, True), (2e-3, 1e11, True), (2e-2, 1e11, False), (4e-2, 1e11, False), (3e-4, 8e9, True)],
)
def test_heads_are_mixed_at_the_latency_of_a_lan_or_where_memory_forces_it(
    rtt_s: float, memory_bytes: float, mixes: bool
) -> None:
    where = parse_topology(
        {
            "devices": [
                {"id": "a", "tier": "edge", "catalog": "jetson-orin-nx-16gb"},
                {"id": "b", "tier": "edge", "catalog": "jetson-orin-nx-16gb"},
            ],
            "links": [{"between": ["a", "b"], "bandwidth_bytes_per_s": 1.25e8, "rtt_s": rtt_s}],
        }
    )
    devices = tuple(replace(d, memory_bytes=memory_bytes) for d in where.devices)
    state = ClusterState(arch=architecture("llama-7b"), topology=replace(where, devices=devices), context_tokens=512)
    placement = solve(state).placement
    assert any(len(x.attention.devices) + len(x.ffn.devices) > 2 for x in placement.layers) == mixes


def random_cluster(seed: int) -> ClusterState:
    """2 to 5 devices of unlike speed and memory, links of 0.1 to 80 ms; every other instance is short of memory."""
    rng = np.random.default_rng(seed)
    arch = toy(num_layers=4, num_heads=6, num_kv_heads=6, ffn_dim=int(rng.choice([256, 1024])), vocab=2000)
    needed = model_bytes(ClusterState(arch=arch, topology=Topology.uniform(1), context_tokens=200))
    num_devices = (2, 3, 2, 4, 2, 3, 5, 2)[seed % 8]
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"), tier="cloud" if i and rng.random() < 0.7 else "edge", compute_flops=1e12,
            memory_bytes=needed * (float(rng.uniform(0.3, 1.2)) if seed % 2 else 3.0),
            memory_bandwidth_bytes_per_s=float(np.exp(rng.uniform(np.log(2e7), np.log(2e9)))),
            launch_s=float(rng.choice([0.0, 1e-5])),
        )
        for i in range(num_devices)
    )  # fmt: skip
    if seed % 7 == 3:  # all on one host, whose memory they share
        devices = tuple(
            replace(d, memory_group="host", shared_bandwidth_bytes_per_s=0.6 * d.memory_bandwidth_bytes_per_s)
            for d in devices
        )
    rtt_s = float(np.exp(rng.uniform(np.log(1e-4), np.log(8e-2))))
    medium = "air" if rng.random() < 0.3 else None
    links = tuple(
        Link(
            source=a.id, target=b.id, bandwidth_bytes_per_s=float(np.exp(rng.uniform(np.log(1e6), np.log(1e9)))),
            rtt_s=rtt_s * float(rng.uniform(0.7, 1.5)), exchange_s=float(rng.choice([0.0, 5e-5])), medium=medium,
        )
        for a, b in itertools.permutations(devices, 2)
    )  # fmt: skip
    holds = ("none", "none", "embedding", "embedding_and_head")[int(rng.integers(4))]
    where = Topology(devices=devices, links=links, origin=devices[0].id, origin_holds=holds)  # type: ignore[arg-type]
    return ClusterState(arch=arch, topology=where, context_tokens=200)


@pytest.mark.full
def test_ours_are_never_slower_than_one_device_or_one_cut_on_64_topologies() -> None:
    compared, gains = 0, []
    for seed in range(64):
        state = random_cluster(seed)
        simple = []
        for name in ("best_device", "layer_cut"):
            try:
                simple.append(seconds(state, make_planner(name).propose(state)))
            except InputError:
                continue  # no room, or no second tier
        for name in ("exact", "drift_plus_penalty"):
            try:
                ours = seconds(state, make_planner(name).propose(state))
            except InputError:
                assert not simple, f"{name} finds nothing on instance {seed}"
                continue
            compared += len(simple)
            assert all(ours <= s * (1 + 1e-9) for s in simple), f"{name} on instance {seed}"
            gains += [min(simple) / ours] if simple else []
    print(
        f"{compared} comparisons; the best of the two simple ones takes {np.mean(gains):.2f} times as long on average"
    )
    assert compared >= 150
