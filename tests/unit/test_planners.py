"""The simple planners: what they propose in tables, and what no planner may ever propose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from splitray.arch import ModelArch
from splitray.errors import InputError, PlacementError
from splitray.placement import LayerPlacement, Placement, Shares, validate, weight_bytes
from splitray.planners import PLANNER_USAGES, CheckedPlanner, ClusterState, make_planner
from splitray.planners.memory import model_bytes, needed_bytes
from splitray.route import compile_route
from splitray.topology import Device, DeviceId, Link, Topology

EDGE_A, EDGE_B, CLOUD_A, CLOUD_B = map(DeviceId, ("edge_a", "edge_b", "cloud_a", "cloud_b"))
ARCH = ModelArch(
    name="toy",
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    hidden_dim=64,
    ffn_dim=96,
    vocab=128,
    context_tokens=256,
)
ARCHS = {
    "sequential": ARCH,
    "parallel_block": dataclasses.replace(ARCH, parallel_block=True),
    "tied": dataclasses.replace(ARCH, tied_embeddings=True),
    "one KV group and few experts": dataclasses.replace(
        ARCH, num_kv_heads=1, ffn_dim=2, num_experts=2, expert_columns=48
    ),
}
SIMPLE = ["even", "proportional", "random", "best_device"]


def cluster(
    *names: str,
    memory_bytes: Sequence[float] | float = 1e9,
    bandwidths: Sequence[float] = (),
    **more: Any,
) -> Topology:
    memory = [memory_bytes] * len(names) if isinstance(memory_bytes, int | float) else memory_bytes
    rates = bandwidths or [1e10] * len(names)
    devices = tuple(
        Device(
            id=DeviceId(name),
            tier="edge" if name.startswith("edge") else "cloud",
            memory_bytes=m,
            compute_flops=1e10,
            memory_bandwidth_bytes_per_s=rate,
        )
        for name, m, rate in zip(names, memory, rates, strict=True)
    )
    links = tuple(
        Link(source=a.id, target=b.id, bandwidth_bytes_per_s=1e7, rtt_s=0.01)
        for a in devices
        for b in devices
        if a is not b
    )
    origin = more.pop("origin", names[0])
    return Topology(devices=devices, links=links, origin=DeviceId(origin), **more)


def propose(spec: str, topology: Topology, arch: ModelArch = ARCH, *, seed: int = 0, context: int = 0) -> Placement:
    state = ClusterState(arch=arch, topology=topology, context_tokens=context)
    return make_planner(spec, seed=seed).propose(state)


def whole(placement: Placement) -> list[DeviceId]:
    """The one holder of each layer."""
    for layer in placement.layers:
        assert layer.attention.devices == layer.ffn.devices and len(layer.ffn.devices) == 1
    return [layer.ffn.devices[0] for layer in placement.layers]


def group_counts(placement: Placement, *devices: str) -> list[tuple[int, ...]]:
    return [tuple(layer.attention.count(d) for d in devices) for layer in placement.layers]


def refused(call: Any, *texts: str) -> None:
    with pytest.raises(PlacementError) as error:
        call()
    assert isinstance(error.value, InputError)
    for text in ("expected ", "got ", *texts):
        assert text in str(error.value)


# Names

WRONG_SPECS = {
    "evn": ("one of edge_only, cloud_only", "'evn'", "did you mean even?"),
    "": ("planner", "one of", "''"),
    "Random": ("did you mean random?",),
    "even:3": ("planner even", "expected even without an argument", "'even:3'", "write even"),
    "even:": ("expected even without an argument",),
    "fixed_cut": ("planner fixed_cut", "expected fixed_cut:P", "'fixed_cut'", "write fixed_cut:P"),
    "fixed_cut:": ("expected fixed_cut:P", "'fixed_cut:'"),
    "fixed_cut:two": ("planner fixed_cut:P", "a whole number of 0 or more", "'two'", "fixed_cut:6"),
    "fixed_cut:-1": ("a whole number of 0 or more", "'-1'"),
    "fixed_cut:1.5": ("a whole number of 0 or more", "'1.5'"),
}


@pytest.mark.parametrize(("spec", "texts"), WRONG_SPECS.items(), ids=[s or "(empty)" for s in WRONG_SPECS])
def test_a_wrong_name_or_argument_is_refused_with_what_to_write(spec: str, texts: tuple[str, ...]) -> None:
    refused(lambda: make_planner(spec), *texts)


@pytest.mark.parametrize("usage", PLANNER_USAGES)
def test_every_listed_planner_proposes_something_valid(usage: str) -> None:
    topology = cluster(EDGE_A, EDGE_B, CLOUD_A)
    spec = usage.replace(":P", ":2").partition("[")[0]
    planner = make_planner(spec)
    assert planner.spec == spec
    validate(planner.propose(ClusterState(arch=ARCH, topology=topology)), ARCH, topology)


def test_every_proposal_is_checked() -> None:
    @dataclasses.dataclass
    class Forgetful:
        def propose(self, state: ClusterState) -> Placement:
            return Placement((), (EDGE_A,), Shares.whole(state.arch.vocab, EDGE_A))

    planner = CheckedPlanner("forgetful", Forgetful())
    refused(lambda: planner.propose(ClusterState(arch=ARCH, topology=cluster(EDGE_A))), "6 of toy", "got 0")


# Whole devices and one cut

WHOLE = {
    "edge_only takes the origin": ("edge_only", cluster(EDGE_A, EDGE_B, CLOUD_A, origin=EDGE_B), EDGE_B),
    "edge_only takes the first edge of a cloud origin": (
        "edge_only",
        cluster(CLOUD_A, EDGE_B, EDGE_A, origin=CLOUD_A),
        EDGE_B,
    ),
    "cloud_only takes the fastest": (
        "cloud_only",
        cluster(EDGE_A, CLOUD_A, CLOUD_B, bandwidths=[9e10, 1e10, 2e10]),
        CLOUD_B,
    ),
    "cloud_only takes the first of equals": ("cloud_only", cluster(EDGE_A, CLOUD_B, CLOUD_A), CLOUD_B),
    "cloud_only passes over one that is too small": (
        "cloud_only",
        cluster(EDGE_A, CLOUD_A, CLOUD_B, memory_bytes=[1e9, 1e4, 1e9], bandwidths=[1e10, 3e10, 2e10]),
        CLOUD_B,
    ),
    "best_device looks at no tier": (
        "best_device",
        cluster(EDGE_A, EDGE_B, CLOUD_A, bandwidths=[1e10, 3e10, 2e10]),
        EDGE_B,
    ),
    "best_device passes over one that is too small": (
        "best_device",
        cluster(EDGE_A, EDGE_B, CLOUD_A, memory_bytes=[1e9, 1e4, 1e9], bandwidths=[1e10, 3e10, 2e10]),
        CLOUD_A,
    ),
}


@pytest.mark.parametrize(("spec", "topology", "device"), WHOLE.values(), ids=WHOLE)
def test_a_whole_model_goes_to_one_device(spec: str, topology: Topology, device: DeviceId) -> None:
    placement = propose(spec, topology)
    assert placement.devices == (device,)
    assert whole(placement) == [device] * ARCH.num_layers


def test_cloud_only_sends_one_token_a_step_to_an_edge_origin() -> None:
    topology = cluster(EDGE_A, CLOUD_A)
    route = compile_route(propose("cloud_only", topology), ARCH, topology)
    assert (route.exchanges_per_token, route.messages_per_token) == (1, 1)
    assert route.bytes_per_token(ARCH) == 4


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_fixed_cut_leaves_its_first_layers_on_the_edge(cut: int) -> None:
    topology = cluster(EDGE_A, EDGE_B, CLOUD_A, CLOUD_B, origin=EDGE_B, bandwidths=[1e10, 1e10, 1e10, 2e10])
    placement = propose(f"fixed_cut:{cut}", topology)
    assert whole(placement) == [EDGE_B] * cut + [CLOUD_B] * (6 - cut)
    assert placement.embedding == (EDGE_B,) and placement.head.devices == (CLOUD_B,)
    assert compile_route(placement, ARCH, topology).exchanges_per_token == 2


def test_fixed_cut_beyond_the_model_is_refused() -> None:
    refused(lambda: propose("fixed_cut:7", cluster(EDGE_A, CLOUD_A)), "0 <= P <= 6", "layers of toy", "got 7")


@pytest.mark.parametrize(
    ("spec", "names", "tier"),
    [
        ("edge_only", (CLOUD_A,), "edge"),
        ("cloud_only", (EDGE_A, EDGE_B), "cloud"),
        ("fixed_cut:1", (CLOUD_A,), "edge"),
        ("fixed_cut:1", (EDGE_A,), "cloud"),
    ],
)
def test_a_missing_tier_is_named(spec: str, names: tuple[str, ...], tier: str) -> None:
    refused(lambda: propose(spec, cluster(*names)), f"at least one device of tier {tier}", names[0], "add one")


# Shares

EVEN_GROUPS = {
    "four groups on two": ((EDGE_A, CLOUD_A), 4, [(2, 2)] * 6),
    "the odd group goes round the devices": (
        (EDGE_A, EDGE_B, CLOUD_A),
        4,
        [(2, 1, 1), (1, 2, 1), (1, 1, 2)] * 2,
    ),
    "fewer groups than devices": (
        (EDGE_A, EDGE_B, CLOUD_A, CLOUD_B),
        2,
        [(1, 1, 0, 0), (0, 0, 1, 1)] * 3,
    ),
    "one group on three": ((EDGE_A, EDGE_B, CLOUD_A), 1, [(1, 0, 0), (0, 1, 0), (0, 0, 1)] * 2),
}


@pytest.mark.parametrize(("names", "groups", "counts"), EVEN_GROUPS.values(), ids=EVEN_GROUPS)
def test_even_balances_head_groups_over_the_layers(
    names: tuple[str, ...], groups: int, counts: list[tuple[int, ...]]
) -> None:
    arch = dataclasses.replace(ARCH, num_kv_heads=groups)
    assert group_counts(propose("even", cluster(*names), arch), *names) == counts


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5, 8])
def test_even_leaves_nobody_more_than_a_piece_ahead(num_devices: int) -> None:
    topology = Topology.uniform(num_devices)
    arch = dataclasses.replace(ARCH, num_kv_heads=2, ffn_dim=97)
    placement = propose("even", topology, arch)
    for piece in ("attention", "ffn"):
        totals = [sum(getattr(x, piece).count(d) for x in placement.layers) for d in topology.ids]
        assert max(totals) - min(totals) <= 1
    rows = [placement.head.count(d) for d in topology.ids]
    assert max(rows) - min(rows) <= 1
    assert placement.embedding == (topology.origin,)


def test_eight_devices_share_a_model_of_two_groups() -> None:
    topology = Topology.uniform(8)
    placement = propose("even", topology, dataclasses.replace(ARCH, num_kv_heads=2))
    assert all(len(x.attention.devices) == 2 and len(x.ffn.devices) == 8 for x in placement.layers)
    compile_route(placement, ARCH, topology)


PROPORTIONAL_GROUPS = {
    "a device three times as fast holds three times as much": ([1e10, 3e10], [1e9, 1e9], [(1, 3)] * 6),
    "halves of a group even out over the layers": ([3e10, 5e10], [1e9, 1e9], [(2, 2), (1, 3)] * 3),
    "a very slow device waits for its turn": (
        [1e9, 23e9],
        [1e9, 1e9],
        [(0, 4)] * 2 + [(1, 3)] + [(0, 4)] * 3,
    ),
}


@pytest.mark.parametrize(("bandwidths", "memory", "counts"), PROPORTIONAL_GROUPS.values(), ids=PROPORTIONAL_GROUPS)
def test_proportional_follows_memory_bandwidth(
    bandwidths: list[float], memory: list[float], counts: list[tuple[int, ...]]
) -> None:
    topology = cluster(EDGE_A, CLOUD_A, memory_bytes=memory, bandwidths=bandwidths)
    assert group_counts(propose("proportional", topology), EDGE_A, CLOUD_A) == counts


def test_proportional_moves_what_does_not_fit_to_devices_with_room() -> None:
    small = 2e5
    topology = cluster(
        EDGE_A,
        EDGE_B,
        CLOUD_A,
        CLOUD_B,
        memory_bytes=[1e9, 1e9, small, 1e9],
        bandwidths=[1e10, 2e10, 6e10, 1e10],
    )
    held = weight_bytes(propose("proportional", topology), ARCH)
    assert 0.95 * small < held[CLOUD_A] <= small
    table = ARCH.vocab * ARCH.hidden_dim * 4
    split = held[EDGE_A] - table
    assert held[EDGE_B] / split == pytest.approx(2, rel=0.1)
    assert held[CLOUD_B] / split == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("spec", ["proportional", "random"])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("spare", [1.02, 1.2])
def test_nearly_full_devices_still_hold_the_model(spec: str, arch: ModelArch, spare: float) -> None:
    if arch.num_experts:
        spare += 0.2  # an expert is a tenth of this model: pieces that large leave gaps
    context = 100
    needed = model_bytes(ClusterState(arch=arch, topology=cluster(EDGE_A), context_tokens=context))
    if arch.tied_embeddings:
        needed += arch.vocab * arch.hidden_dim * arch.dtype_bytes  # head rows away from the embedding are copies
    topology = cluster(
        EDGE_A,
        EDGE_B,
        CLOUD_A,
        memory_bytes=[needed * spare * part for part in (0.3, 0.3, 0.4)],
        bandwidths=[1, 8, 1],
    )
    placement = propose(spec, topology, arch, context=context)
    state = ClusterState(arch=arch, topology=topology, context_tokens=context)
    for device, held in needed_bytes(placement, state).items():
        assert held <= topology.device(device).memory_bytes


# Random


def test_the_same_seed_gives_the_same_sequence_of_proposals() -> None:
    state = ClusterState(arch=ARCH, topology=cluster(EDGE_A, EDGE_B, CLOUD_A))
    first, again, other = (
        make_planner("random", seed=3),
        make_planner("random", seed=3),
        make_planner("random"),
    )
    drawn = [first.propose(state) for _ in range(3)]
    assert drawn == [again.propose(state) for _ in range(3)]
    assert drawn[0] != drawn[1] and drawn[0] != other.propose(state)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_random_placements_are_valid_and_of_every_kind(arch: ModelArch) -> None:
    kinds = set()
    for num_devices in range(1, 6):
        topology = Topology.uniform(num_devices)
        planner = make_planner("random", seed=num_devices)
        for _ in range(30):
            placement = planner.propose(ClusterState(arch=arch, topology=topology))
            validate(placement, arch, topology)
            for layer in placement.layers:
                kinds |= {kind(layer, arch), *(["scattered"] if scattered(layer) else [])}
            kinds.add(f"{min(2, len(placement.embedding))} embedding")
            kinds.add(f"{min(2, len(placement.head.devices))} head")
    ends = {"1 embedding", "2 embedding", "1 head", "2 head"}
    blocks = {"whole", "partitioned", "replicated"} | ({"scattered"} if arch.ffn_dim > 2 else set())
    assert kinds == ends | blocks


def kind(layer: LayerPlacement, arch: ModelArch) -> str:
    if layer.ffn.is_replicated(arch.ffn_dim):
        return "replicated"
    return "partitioned" if len(layer.ffn.devices) > 1 else "whole"


def scattered(layer: LayerPlacement) -> bool:
    return any(len(ranges) > 1 for _, ranges in layer.ffn.by_device)


# Rules for all


@pytest.mark.parametrize("spec", ["edge_only", "cloud_only", "fixed_cut:2", *SIMPLE])
@pytest.mark.parametrize("origin", [EDGE_B, CLOUD_A])
@pytest.mark.parametrize("holds", ["embedding", "embedding_and_head"])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_pinned_pieces_stay_on_the_origin(spec: str, origin: str, holds: str, arch: ModelArch) -> None:
    topology = cluster(EDGE_A, EDGE_B, CLOUD_A, CLOUD_B, origin=origin, origin_holds=holds)
    placement = propose(spec, topology, arch)
    assert placement.embedding == (origin,)
    if holds == "embedding_and_head":
        assert placement.head.devices == (origin,)


@pytest.mark.parametrize("spec", ["edge_only", "cloud_only", "fixed_cut:2", *SIMPLE])
def test_a_model_that_fits_nowhere_is_refused_with_the_bytes(spec: str) -> None:
    topology = cluster(EDGE_A, CLOUD_A, memory_bytes=1e5)
    refused(lambda: propose(spec, topology), "memory", "bytes", "100,000", "toy" if spec != "even" else "edge_a")


def test_an_embedding_that_does_not_fit_on_its_origin_is_refused_with_the_bytes() -> None:
    topology = cluster(EDGE_A, CLOUD_A, memory_bytes=[1e4, 1e9], origin_holds="embedding")
    table = f"{ARCH.vocab * ARCH.hidden_dim * 4:,}"
    for spec in ("cloud_only", "proportional"):
        refused(lambda s=spec: propose(s, topology), table, "10,000")


def test_the_context_s_kv_cache_needs_room_as_well() -> None:
    state = ClusterState(arch=ARCH, topology=cluster(EDGE_A, CLOUD_A), context_tokens=1000)
    kv = 6 * 4 * 2 * 8 * 4 * 1000
    assert model_bytes(state) == ARCH.num_params * 4 + kv
    tight = dataclasses.replace(state, topology=cluster(EDGE_A, memory_bytes=model_bytes(state)))
    assert needed_bytes(make_planner("edge_only").propose(tight), tight) == {EDGE_A: model_bytes(state)}
    longer = dataclasses.replace(tight, context_tokens=1001)
    refused(lambda: make_planner("edge_only").propose(longer), f"{model_bytes(longer):,} bytes on edge_a")
    refused(
        lambda: make_planner("even").propose(longer),
        "weights and the KV of 1001 tokens",
        f"{model_bytes(longer):,} bytes on edge_a of {model_bytes(state):,}",
        "shorten the context",
    )
