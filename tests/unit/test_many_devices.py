"""Planning with many devices: stars of edges, whose tables must not grow with the square of the edges."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from splitray.arch import ModelArch
from splitray.catalog import architecture
from splitray.commands.cli import app
from splitray.cost import CostModel, Rates, load_of, step_cost
from splitray.errors import InputError, PlacementError, TopologyError
from splitray.placement import Placement
from splitray.planners import ClusterState, make_planner
from splitray.planners.exact import ExactResult, solve
from splitray.planners.layer_times import layer_times
from splitray.planners.memory import check
from splitray.planners.optimum.deadline import Deadline
from splitray.planners.optimum.floor import floor_s
from splitray.planners.optimum.space import Space
from splitray.planners.priced import priced
from splitray.planners.protocol import MANY_DEVICES
from splitray.report.export import as_text
from splitray.report.picture import placement_picture
from splitray.report.plan import plan_table
from splitray.route import compile_route
from splitray.sim.arena import Case, run
from splitray.sim.scenario import Scenario
from splitray.sim.workload import Requests
from splitray.topology import Device, DeviceId, Link, Topology

ANY_NUMBER = (
    "edge_only", "cloud_only", "cloud_only_rtt", "best_device", "fixed_cut:1", "round_robin", "greedy", "static_cut",
    "layer_cut", "layer_cut:paper", "layer_dp", "layer_dp:throughput", "tensor_parallel", "exact:1",
    "drift_plus_penalty", "myopic", "myopic:paper", "ucb", "splitwise",
)  # fmt: skip
SO_MANY = (
    "even", "proportional", "tensor_parallel:paper", "random", "myopic:max", "myopic:weighted", "myopic:as_coded",
)  # fmt: skip
README = Path(__file__).resolve().parents[2] / "README.md"
MB = 1e6


def star(
    num_edges: int, *, clouds: int = 1, unlike: bool = False, mesh: bool = False, cloud_bytes: float = 8e10
) -> Topology:
    """Edges that each have a link to every cloud; `unlike` in memory, speed and links; `mesh`: to each other, too."""
    rng = np.random.default_rng(num_edges)

    def some(low: float, high: float, otherwise: float) -> float:
        return float(rng.uniform(low, high)) if unlike else otherwise

    far = [
        Device(id=DeviceId(f"cloud{i}"), tier="cloud", memory_bytes=cloud_bytes, compute_flops=1e14,
               memory_bandwidth_bytes_per_s=1e12)
        for i in range(clouds)
    ]  # fmt: skip
    near = [
        Device(id=DeviceId(f"edge{i}"), tier="edge", memory_bytes=some(1e9, 2e10, 8e9),
               compute_flops=some(1e10, 1e12, 1e11), memory_bandwidth_bytes_per_s=some(5e9, 1e11, 2e10),
               idle_w=1.0, active_w=5.0)
        for i in range(num_edges)
    ]  # fmt: skip
    ends = [(a.id, b.id) for a in near for b in far] + [(a.id, b.id) for a, b in itertools.pairwise(far)]
    ends += [(a.id, b.id) for a, b in itertools.combinations(near, 2)] if mesh else []
    links = []
    for a, b in ends:
        rate, rtt_s = some(1e6, 1e8, 1e8), some(1e-3, 5e-2, 1e-2)
        links += [Link(source=s, target=t, bandwidth_bytes_per_s=rate, rtt_s=rtt_s) for s, t in ((a, b), (b, a))]
    return Topology(devices=(*near, *far), links=tuple(links), origin=near[0].id)


@pytest.fixture(scope="module")
def arch() -> ModelArch:
    return replace(architecture("gpt2-xl"), num_layers=4)


def proposed(planner: str, arch: ModelArch, where: Topology) -> tuple[Placement, float]:
    """A placement that can be run, and the bytes that planning took at most."""
    state = ClusterState(arch=arch, topology=where, context_tokens=128)
    tracemalloc.start()
    try:
        placement = make_planner(planner).propose(state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    check(placement, state)
    compile_route(placement, arch, where)
    return placement, peak


@pytest.mark.thin(3)
@pytest.mark.parametrize("planner", [p for p in ANY_NUMBER if p != "round_robin"])
def test_300_edges_take_little_memory(planner: str, arch: ModelArch) -> None:
    assert proposed(planner, arch, star(300))[1] < 60 * MB


@pytest.mark.full
@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize("planner", [p for p in ANY_NUMBER if p != "round_robin"])
def test_3000_edges_take_little_memory(planner: str, unlike: bool, arch: ModelArch) -> None:
    assert proposed(planner, arch, star(3000, unlike=unlike))[1] < 120 * MB


@pytest.mark.parametrize("num_edges", [1, 30])
@pytest.mark.parametrize("planner", ["layer_cut", "myopic"])
def test_two_clouds_and_unlike_edges_are_planned_for(planner: str, num_edges: int, arch: ModelArch) -> None:
    proposed(planner, arch, star(num_edges, clouds=2, unlike=True))


@pytest.mark.parametrize("planner", SO_MANY)
def test_planners_that_share_among_all_say_how_many_they_take(planner: str, arch: ModelArch) -> None:
    with pytest.raises(PlacementError, match=r"at most 128 devices, got 301 in the topology"):
        make_planner(planner).propose(ClusterState(arch=arch, topology=star(300)))


def test_the_readme_names_those_and_their_number() -> None:
    listed = next(x for x in README.read_text().split("\n\n") if x.startswith("Any number of devices"))
    assert f"take at most {MANY_DEVICES}" in listed
    assert all(f"`{planner}`" in listed for planner in SO_MANY)
    assert {make_planner(p).most_devices for p in SO_MANY} == {MANY_DEVICES}
    assert {make_planner(p).most_devices for p in ANY_NUMBER} == {None}


def test_a_planner_from_outside_may_say_how_many_it_takes(arch: ModelArch) -> None:
    class Small:
        most_devices = 2

        def propose(self, state: ClusterState) -> Placement:
            raise AssertionError("is not asked")

    with pytest.raises(PlacementError, match="planner Small: expected at most 2 devices, got 4"):
        make_planner(Small()).propose(ClusterState(arch=arch, topology=star(3)))
    Small.most_devices = 0
    with pytest.raises(PlacementError, match="most_devices to be None or a whole number"):
        make_planner(Small())


def test_a_simulation_keeps_tables_of_the_devices_that_take_part(arch: ModelArch) -> None:
    requests = Requests(np.array([0.0, 1.0]), np.array([16, 16]), np.array([8, 8]))
    scenario = Scenario(name="star", arch=arch, topology=star(300), requests=requests, num_slots=4)
    tracemalloc.start()
    outcomes = run(
        [Case(planner=planner, scenario=scenario) for planner in ("fixed_cut:2", "layer_cut", "myopic:paper")]
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * MB
    for outcome in outcomes:
        assert np.isfinite(outcome.finish_s).all()
        assert outcome.energy_j.shape[1] == 301, "idle ones spend energy too"


def test_in_a_mesh_of_100_the_sharing_ones_still_answer(arch: ModelArch) -> None:
    where = star(100, mesh=True)
    for planner in ("even", "round_robin", "myopic:max"):
        placement, peak = proposed(planner, arch, where)
        assert peak < 200 * MB
        assert len(placement.devices) > (90 if planner == "even" else 0)


def test_a_missing_link_shows_before_millions_of_messages_are_made(arch: ModelArch) -> None:
    where = star(120)
    placement = make_planner("even").propose(ClusterState(arch=arch, topology=where))
    tracemalloc.start()
    with pytest.raises(TopologyError, match="link edge0 -> edge1"):
        compile_route(placement, arch, where)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MB


def test_devices_that_hold_nothing_change_no_price(arch: ModelArch) -> None:
    where = star(6, unlike=True)
    placement = make_planner("fixed_cut:2").propose(ClusterState(arch=arch, topology=where))
    some = CostModel(arch, where).decode(placement, context_tokens=9)
    every = step_cost(load_of(placement, arch, where), Rates.of(where), context_tokens=9)
    for name in ("cycle_s", "origin_s", "busy_s", "radio_s"):
        np.testing.assert_allclose(getattr(some, name), getattr(every, name), rtol=1e-12)
    assert some.energy_j(where).shape == (1, 7)


def test_times_by_pair_are_those_of_the_links(arch: ModelArch) -> None:
    where = star(5, clouds=2, unlike=True)
    times, hidden = layer_times(ClusterState(arch=arch, topology=where)), arch.hidden_dim * arch.dtype_bytes
    every = np.arange(len(where.ids))
    matrix = times.state_s[every[:, None], every]
    for (i, a), (j, b) in itertools.product(enumerate(where.ids), repeat=2):
        link = where.link(a, b)
        expected = 0.0 if a == b else np.inf if link is None else link.transfer_s(hidden)
        assert matrix[i, j] == times.state_s[i, j] == pytest.approx(expected)
        assert (j in times.state_s.targets(i)) == (a == b or link is not None)


def test_a_path_through_devices_that_a_space_leaves_out_is_none(arch: ModelArch) -> None:
    state = ClusterState(arch=arch, topology=star(20))
    space = Space(Space.part(state))
    assert len(space.topology.ids) < 20
    inside, outside = (make_planner(p).propose(state) for p in ("edge_only", "round_robin"))
    assert space.path_of(inside) is not None
    assert not space.topology.index.keys() >= set(outside.devices)
    assert space.path_of(outside) is None


def small_state(seed: int) -> ClusterState:
    rng = np.random.default_rng(seed)
    many = int(rng.integers(1, 4))
    devices = tuple(
        Device(id=DeviceId(f"d{i}"), tier="edge", memory_bytes=float(rng.choice([2e5, 5e5, 1e6])), compute_flops=1e12,
               memory_bandwidth_bytes_per_s=float(rng.choice([1e8, 1.5e8, 1e9])), launch_s=float(rng.choice([0, 1e-5])))
        for i in range(many)
    )  # fmt: skip
    links = tuple(
        Link(source=a.id, target=b.id, bandwidth_bytes_per_s=float(rng.choice([1e6, 1e9])),
             rtt_s=float(rng.choice([0, 1e-5, 1e-3])))
        for a, b in itertools.permutations(devices, 2)
    )  # fmt: skip
    holds = rng.choice(["none", "none", "embedding", "embedding_and_head"])
    where = Topology(devices=devices, links=links, origin=devices[0].id, origin_holds=holds)
    model = ModelArch(
        name="toy", num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, hidden_dim=64, ffn_dim=256, vocab=200,
        context_tokens=64, parallel_block=bool(rng.random() < 0.3),
    )  # fmt: skip
    return ClusterState(arch=model, topology=where, context_tokens=8)


def test_the_floor_is_below_the_best_that_is_found_with_pins_and_parallel_blocks_too() -> None:
    for seed in range(4):
        state = small_state(seed)
        try:
            found = solve(state)
        except InputError:
            continue
        least_s = floor_s(state)
        assert 0 < least_s <= found.tpot_s * (1 + 1e-9), f"instance {seed}"


def test_a_star_of_equal_edges_is_proven_without_a_search_over_all_of_them() -> None:
    state = ClusterState(arch=replace(architecture("gpt2-xl"), num_layers=2), topology=star(40, cloud_bytes=1e6))
    found = solve(state, "one_device")
    assert found.proven and found.lower_bound_s == pytest.approx(found.tpot_s)
    assert found.placement.devices == (state.topology.origin,)


class Steps:
    """A clock that shows how often it was asked."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self) -> float:
        self.steps += 1
        return float(self.steps)


@pytest.fixture(scope="module")
def searched() -> tuple[ClusterState, ExactResult, int]:
    """A search whose result is no one else's proposal, and how often it looked at the clock."""
    where = star(3, unlike=True, mesh=True, cloud_bytes=1e6)
    links = tuple(replace(x, rtt_s=1e-4, bandwidth_bytes_per_s=1e9) for x in where.links)
    state = ClusterState(arch=replace(architecture("gpt2-xl"), num_layers=3), topology=replace(where, links=links))
    steps = Steps()
    return state, solve(state, deadline=Deadline(1e9, steps)), steps.steps


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.9, 1.1])
def test_a_search_that_ends_early_gives_its_best_and_a_true_bound(
    searched: tuple[ClusterState, ExactResult, int], share: float
) -> None:
    state, whole, steps = searched
    assert steps > 500, "long loops look at the clock"
    found = solve(state, deadline=Deadline(max(1.0, share * steps), Steps()))
    check(found.placement, state)
    assert found.tpot_s == pytest.approx(
        CostModel(state.arch, state.topology).tpot_s(found.placement, context_tokens=1)
    )
    assert found.lower_bound_s <= whole.tpot_s * (1 + 1e-9) and found.tpot_s >= whole.tpot_s * (1 - 1e-9)
    if share > 1:
        assert (found.placement, found.lower_bound_s) == (whole.placement, whole.lower_bound_s)


def test_what_is_known_is_never_worse_after_no_time(arch: ModelArch) -> None:
    state = ClusterState(arch=arch, topology=star(30))
    known = make_planner("fixed_cut:2").propose(state)
    found = solve(state, known=[known], deadline=Deadline(0.0, Steps()))
    assert found.tpot_s <= CostModel(arch, state.topology).tpot_s(known, context_tokens=1)


@pytest.mark.parametrize("limit_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit_s: float, arch: ModelArch) -> None:
    with pytest.raises(InputError, match="limit_s: expected a number of seconds above 0"):
        priced(arch, star(1), "best_device", context_tokens=8, limit_s=limit_s)
    with pytest.raises(InputError, match="exact:SECONDS"):
        make_planner(f"exact:{limit_s}")


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "star.yaml"
    devices = ["{id: c, tier: cloud, catalog: a100-80gb, memory_bytes: 2e9}"]
    devices += [f"{{id: e{i}, tier: edge, catalog: jetson-orin-nx-8gb}}" for i in range(300)]
    links = [f"{{between: [e{i}, c], bandwidth_bytes_per_s: 1e8, rtt_s: 1e-4}}" for i in range(300)]
    path.write_text(f"devices: [{', '.join(devices)}]\nlinks: [{', '.join(links)}]\n")
    yield path


def test_plan_says_what_is_not_proven_and_how_many_hold_nothing(written: Path) -> None:
    arguments = [
        "plan",
        "--model",
        "gpt2-xl",
        "--topology",
        str(written),
        "--planner",
        "layer_cut",
        "--limit-s",
        "0.01",
    ]
    text = " ".join(CliRunner().invoke(app, arguments).stdout.split())
    assert "not proven, none below" in text
    assert "299 devices hold nothing" in text
    assert "layers 0-" in text and "layer 1 " not in text
    assert CliRunner().invoke(app, [*arguments[:-1], "0"]).exit_code == 2


def test_pictures_and_tables_of_many_devices_are_short(arch: ModelArch) -> None:
    where = star(300)
    found = priced(arch, where, "fixed_cut:2", context_tokens=64, limit_s=0.01)
    picture = as_text(placement_picture(found.placement, arch, where)).splitlines()
    assert [line.split()[:2] for line in picture[2:4]] == [["layers", "0-1"], ["layers", "2-3"]]
    assert len({line.split()[2][0] for line in picture[2:4]}) == 2, "a letter for each of the two"
    assert "299 devices hold nothing" in as_text(plan_table(found.document(), where))
