"""The learned planner: it does what its policy did in training, refuses what it was not trained for, and is safe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitray.errors import InputError, PlacementError
from splitray.placement import validate
from splitray.planners import ClusterState, make_planner
from splitray.planners.memory import check
from splitray.planners.protocol import RequestShape
from splitray.queues import QueueState
from splitray.rl.policy_planner import SHIPPED, Splitwise
from splitray.rl.world.action import FREE, ActionSpec
from splitray.rl.world.cell import Cell, references
from splitray.rl.world.policy import Policy
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate, Weather, draw
from splitray.sim.arena import Case, run
from splitray.sim.scenario import Scenario, edge_cloud_links
from splitray.sim.workload import poisson
from splitray.topology import Topology

SLOTS = 60
EDGES = 4
CLIMATE = Climate(cloud_load=0.8, users=EDGES, bandwidth_sigma=0.6, rtt_sigma=0.2)
CELL = Cell(edge="jetson-orin-nx-16gb", model="gpt2-xl", holds="none", link="lte")


def state(cell: Cell = CELL) -> ClusterState:
    return ClusterState(arch=cell.arch, topology=cell.topology, context_tokens=400, request=RequestShape(128, 64))


def drawn(seed: int) -> Weather:
    known = references(CELL.arch, CELL.topology, CLIMATE.request)
    return draw(CLIMATE, CELL.topology, known, window_tokens=CELL.arch.context_tokens, num_instances=EDGES,
                num_slots=SLOTS, slot_s=1.0, rng=np.random.default_rng(seed))  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_it_serves_as_its_policy_did_in_training(seed: int) -> None:
    """The same weather through the environment and through the common executor gives the same answers."""
    policy, rng = Policy.load(SHIPPED), np.random.default_rng(seed)
    lines = tuple(poisson(0.15, SLOTS, rng=rng) for _ in range(EDGES))
    shape = Scenario(name="", arch=CELL.arch, topology=CELL.topology, requests=lines[0], num_slots=1).shape
    assert shape is not None
    weather, climate = replace(drawn(seed), requests=lines), replace(CLIMATE, request=shape)
    env = VectorEnv(CELL, climate, spec=ActionSpec(), rng=np.random.default_rng(0), weather=weather)
    env.longest[:] = [(x.prompt_tokens + x.output_tokens).max() for x in lines]
    for _ in range(SLOTS):
        env.high_rows()
        whole, groups = env._features
        knobs = policy.knobs(whole, groups)
        env.step(np.concatenate([np.full((EDGES, 12), FREE), knobs], axis=1))
    pairs, cases = edge_cloud_links(CELL.topology), []
    for i, line in enumerate(lines):
        scenario = Scenario(
            name="same", mean_request=shape, arch=CELL.arch, topology=CELL.topology, requests=line, num_slots=SLOTS,
            bandwidth_bytes_per_s=dict.fromkeys(pairs, weather.link_bytes_per_s[i]),
            rtt_s=dict.fromkeys(pairs, weather.rtt_s[i]),
        )  # fmt: skip
        cases.append(Case(planner="splitwise", scenario=scenario, pool=0))
    for i, outcome in enumerate(run(cases, drain=False)):
        theirs = env.simulator.finish_s[i, : len(lines[i])]
        assert np.isfinite(theirs).any(), "the test is about something"
        both = np.isfinite(theirs) & np.isfinite(outcome.finish_s)
        assert (np.isfinite(theirs) == np.isfinite(outcome.finish_s)).mean() > 0.8
        assert outcome.finish_s[both] == pytest.approx(theirs[both], rel=0.05)


@pytest.mark.parametrize("edge", ["jetson-orin-nx-16gb", "galaxy-s23", "raspberry-pi-5"])
@pytest.mark.parametrize("model", ["gpt2-xl", "llama-7b", "llama-13b"])
@pytest.mark.parametrize("holds", ["none", "embedding_and_head"])
def test_every_proposal_is_valid_and_fits(edge: str, model: str, holds: str) -> None:
    where = state(Cell(edge=edge, model=model, holds=holds))  # type: ignore[arg-type]
    placement = make_planner("splitwise").propose(where)
    validate(placement, where.arch, where.topology)
    check(placement, where)


def test_it_decides_within_a_millisecond_or_so() -> None:
    import time

    planner, where = make_planner("splitwise").planner, state(replace(CELL, model="llama-7b"))
    where = replace(where, current=planner.propose(where), cached_tokens=100, step_tokens=101)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        planner.propose(where)
        times.append(time.perf_counter() - started)
    print(f"a decision of splitwise: {1e3 * np.median(times):.2f} ms, best {1e3 * min(times):.2f}")


@pytest.mark.parametrize(
    ("cell", "gains"),
    [
        (CELL, True),
        (replace(CELL, edge="raspberry-pi-5"), False),
        (replace(CELL, model="llama-13b"), False),
        (replace(CELL, holds="embedding_and_head"), False),
    ],
    ids=["a Jetson", "too slow", "too small", "every token crosses"],
)
def test_where_the_edge_cannot_relieve_the_cloud_the_program_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, cell: Cell, gains: bool
) -> None:
    asked = []
    turned = Policy.knobs

    def knobs(*args: Any) -> Any:
        asked.append(args)
        return turned(*args)

    monkeypatch.setattr(Policy, "knobs", knobs)
    make_planner("splitwise").propose(state(cell))
    assert bool(asked) == gains


def test_a_backlog_beyond_its_limit_overrides_the_policy() -> None:
    planner = Splitwise(Policy.load(SHIPPED), most_requests=2)
    planner.propose(replace(state(), queues=QueueState(backlog_tokens=100.0)))
    assert planner.overrides == 0
    planner.propose(replace(state(), queues=QueueState(backlog_tokens=200.0)))
    assert planner.overrides == 1


def test_of_several_devices_it_takes_the_origin_and_the_fastest_cloud() -> None:
    placement = make_planner("splitwise").propose(replace(state(), topology=Topology.uniform(3)))
    assert set(placement.devices) <= {"edge0", "cloud0"}
    with pytest.raises(PlacementError, match="an edge and a cloud device"):
        make_planner("splitwise").propose(replace(state(), topology=Topology.uniform(2, num_edges=2)))


def test_a_cloud_that_stands_first_is_no_matter() -> None:
    there = state()
    turned = replace(there, topology=replace(there.topology, devices=there.topology.devices[::-1]))
    first, second = (make_planner("splitwise").propose(s) for s in (there, turned))
    assert first == second or set(first.devices) == set(second.devices)


def test_damaged_or_foreign_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        Policy.load(tmp_path / "absent")
    card, raw = SHIPPED.with_suffix(".json").read_text(), SHIPPED.with_suffix(".safetensors").read_bytes()
    path = tmp_path / "policy"
    for change, complaint in (
        ({}, "sha256"),
        ({"features": "other"}, "features"),
        ({"variant": "other"}, "variant"),
        ({"variant": "no_dp"}, "agents"),
        ({"hidden": 63}, "tensor"),
    ):
        path.with_suffix(".json").write_text(json.dumps({**json.loads(card), **change}))
        path.with_suffix(".safetensors").write_bytes(raw if change else raw[:-4] + b"\0\0\0\1")
        with pytest.raises(InputError, match=complaint):
            Policy.load(path)


def test_the_shipped_card_tells_how_it_was_made() -> None:
    card = Policy.load(SHIPPED).card
    assert card["recipe"]["name"] == "splitwise"
    assert card["results"]["held_out"], "compared with the program on weather that it never saw"
    assert SHIPPED.with_suffix(".safetensors").stat().st_size < 1e6
