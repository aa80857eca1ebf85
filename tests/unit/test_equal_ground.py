"""Planners on equal terms: close to the optimum, never beaten inside their own space, and frugal among equals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.errors import InputError
from splitray.evaluate.gaps import gaps, instance
from splitray.placement import Placement
from splitray.planners import PLANNER_USAGES, ClusterState, make_planner
from splitray.planners.exact import solve
from splitray.planners.whole import layers_on
from splitray.topology import Device, DeviceId, Link, Topology

ARCH = ModelArch(
    name="toy", num_layers=3, num_heads=4, num_kv_heads=4, head_dim=16, hidden_dim=64, ffn_dim=192, vocab=300,
    context_tokens=512,
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("holds", ["none", "embedding_and_head"])
def test_myopic_is_within_five_percent_of_exact_on_40_instances(holds: str) -> None:
    found, taken = gaps(holds, ("myopic", "myopic:paper"))  # type: ignore[arg-type]
    for name, each in found.items():
        print(f"origin holds {holds}: {name} {np.nanmean(each):.2%} above exact, {np.mean(taken[name]) * 1e3:.0f} ms")
    assert len(found["myopic"]) == 40
    assert not np.isnan(found["myopic"]).any(), "it finds a place where there is one"
    assert min(found["myopic"]) >= -1e-9, "exact knows what myopic finds"
    assert np.mean(found["myopic"]) <= 0.05


def names(*, of: str = "") -> list[str]:
    """Every planner with each of its variants; `of` one name, its own alone."""
    found = []
    for usage in PLANNER_USAGES:
        name, _, variants = usage.partition("[:")
        found += [name.replace(":P", ":1"), *(f"{name}:{v}" for v in variants.rstrip("]").split("|") if v.islower())]
    return [n for n in found if n.partition(":")[0] == of] if of else found


def placed(state: ClusterState, name: str) -> Placement | None:
    """What the planner proposes, None where that is nothing, or needs a link that is not there."""
    try:
        placement = make_planner(name).propose(state)
        CostModel(state.arch, state.topology).tpot_s(placement, context_tokens=max(1, state.context_tokens))
    except InputError:
        return None
    return placement


CUTS = ("layer_cut:paper", "static_cut", "static_cut:paper", "best_device", "edge_only", "cloud_only", "cloud_only_rtt",
        "fixed_cut:0", "fixed_cut:1", "fixed_cut:2", "fixed_cut:4")  # fmt: skip
WITHIN = {
    "best_device": ("edge_only", "cloud_only", "ucb"),
    "layer_cut": CUTS,
    "static_cut": ("layer_cut", *CUTS),
    "layer_dp": ("layer_dp:paper", "layer_dp:throughput", "layer_cut", "greedy", *CUTS),
    "tensor_parallel": ("tensor_parallel:paper", "edge_only"),
}
"""What claims to be the best of its kind, and others of that kind; of `exact` and its bound that is every planner."""


@pytest.mark.thin(4)
@pytest.mark.parametrize("holds", ["none", "embedding_and_head"])
@pytest.mark.parametrize("seed", range(6))
def test_no_planner_that_claims_an_optimum_is_beaten_inside_its_space(seed: int, holds: str) -> None:
    state = instance(100 + seed, holds)  # type: ignore[arg-type]
    cost = CostModel(state.arch, state.topology)
    every = {n: p for n in {*names(), *CUTS} if (p := placed(state, n)) is not None}
    seconds = {n: cost.tpot_s(p, context_tokens=state.context_tokens) for n, p in every.items()}
    for best, others in WITHIN.items():
        for other in others:
            if other in seconds:
                assert seconds[best] <= seconds[other] * (1 + 1e-9), f"{best} against {other}"
    result = solve(state)
    assert result.lower_bound_s is not None
    for other, taken in seconds.items():
        assert result.tpot_s <= taken * (1 + 1e-9), f"exact against {other}"
        assert result.lower_bound_s <= taken * (1 + 1e-9), f"the bound against {other}"


def equal_devices(seed: int) -> ClusterState:
    """Two edges and two clouds of one speed, with links that cost the same or nothing: many placements are equal."""
    rng = np.random.default_rng(seed)
    devices = tuple(
        Device(
            id=DeviceId(n), tier="edge" if n[0] == "e" else "cloud", memory_bytes=1e9, compute_flops=1e12,
            memory_bandwidth_bytes_per_s=1e8, idle_w=1.0, active_w=float(rng.uniform(2, 30)),
            radio_w=float(rng.choice([0.0, 2.0])),
        )
        for n in rng.permutation(["e0", "e1", "c0", "c1"])
    )  # fmt: skip
    rtt_s = float(rng.choice([0.0, 1e-2]))
    links = tuple(
        Link(source=a.id, target=b.id, bandwidth_bytes_per_s=float(rng.choice([1e15, 1e8])), rtt_s=rtt_s)
        for a, b in itertools.permutations(devices, 2)
    )
    origin = next(d.id for d in devices if d.tier == "edge")
    holds = ("none", "embedding", "embedding_and_head")[seed % 3]
    where = Topology(devices=devices, links=links, origin=origin, origin_holds=holds)  # type: ignore[arg-type]
    return ClusterState(arch=ARCH, topology=where, context_tokens=100)


def chains(state: ClusterState) -> Iterator[tuple[str, Placement]]:
    """All placements of whole layers on three of the devices, and the smallest space that each is in."""
    ids, total = state.topology.ids, state.arch.num_layers
    for layers in itertools.product(ids, repeat=total):
        runs = [d for d, _ in itertools.groupby(layers)]
        for e, h in itertools.product(ids, repeat=2):
            placement = layers_on(layers, e, h, state)
            ends = state.pinned_embedding or e, state.pinned_head or h
            whole = len(runs) == 1 and all(p or x == runs[0] for p, x in zip(_pins(state), ends, strict=True))
            cut = len(runs) <= 2 and (_pins(state)[0] or e == runs[0]) and (_pins(state)[1] or h == runs[-1])
            kind = "one" if whole else "cut" if cut else "shards" if len(set(runs)) == len(runs) else "layers"
            yield kind, placement


def _pins(state: ClusterState) -> tuple[bool, bool]:
    return state.pinned_embedding is not None, state.pinned_head is not None


KINDS = {
    "best_device": ("one",), "static_cut": ("one", "cut"), "layer_cut": ("one", "cut"),
    "layer_dp": ("one", "cut", "shards"), "myopic": ("one", "cut", "shards", "layers"),
    "drift_plus_penalty": ("one", "cut", "shards", "layers"), "exact": ("one", "cut", "shards", "layers"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(9))
def test_equal_latency_never_costs_more_edge_energy(seed: int) -> None:
    state = equal_devices(seed)
    cost, where = CostModel(state.arch, state.topology), state.topology
    edge = [d.tier == "edge" for d in where.devices]

    def priced(placement: Placement) -> tuple[float, float]:
        step = cost.decode(placement, context_tokens=state.context_tokens)
        return float(step.cycle_s[0]), float(step.energy_j(where)[0, edge].sum())

    ours = {name: make_planner(name).propose(state) for name in KINDS}
    others = [(kind, *priced(p)) for kind, p in chains(state)] + [("any", *priced(p)) for p in ours.values()]
    for name, placement in ours.items():
        seconds, joule = priced(placement)
        mine = KINDS[name] + (("any",) if "layers" in KINDS[name] else ())
        for kind, other_s, other_j in others:
            if kind in mine and abs(other_s / seconds - 1) < 1e-12:
                assert joule <= other_j * (1 + 1e-6), f"{name}: {joule} J where {other_j} J are as quick"
