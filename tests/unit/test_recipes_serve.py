"""Every recipe's policy is served by `splitwise:PATH`, which decides what training executes. Nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rllib_configs.__main__ import RECIPES
from splitray.cost import Rates
from splitray.planners import ClusterState, make_planner
from splitray.planners.memory import check
from splitray.planners.protocol import RequestShape
from splitray.queues import QueueState
from splitray.rl.policy_planner import Served, Splitwise
from splitray.rl.training.export import export
from splitray.rl.training.holdout import learned
from splitray.rl.training.learner import act_of
from splitray.rl.training.module import PlacementModule, module_specs
from splitray.rl.world.cell import Cell
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate

CLIMATE = Climate(cloud_load=0.8, users=4, bandwidth_sigma=0.6, rtt_sigma=0.2)
CELLS = [
    Cell(edge="jetson-orin-nx-16gb", model="gpt2-xl", holds="none", link="lte"),
    Cell(edge="raspberry-pi-5", model="llama-7b", holds="embedding_and_head", link="lte"),
]
SLOTS = 8


def untrained(name: str, path: Path) -> dict[str, PlacementModule]:
    """Random networks of a recipe that make up their minds, and their files."""
    recipe = RECIPES[name](0)
    torch.manual_seed(3)
    modules = {}
    for agent, spec in module_specs(recipe).items():
        module = spec.build()
        assert isinstance(module, PlacementModule)
        with torch.no_grad():
            for head in (module.knobs, module.choose if module.chooses_groups else None):
                if head is not None:
                    head.weight.mul_(100)  # begun nearly indifferent
        modules[agent] = module
    export(modules, recipe, path)
    return modules


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_can_be_trained_can_be_used(name: str, tmp_path: Path) -> None:
    modules, recipe = untrained(name, tmp_path / "policy"), RECIPES[name](0)
    planner = make_planner(f"splitwise:{tmp_path / 'policy'}")
    for cell in CELLS:
        for backlog in (0.0, 500.0, 1e6):
            state = ClusterState(
                arch=cell.arch, topology=cell.topology, context_tokens=300, request=RequestShape(128, 64),
                queues=QueueState(backlog_tokens=backlog), step_tokens=200, cached_tokens=199,
            )  # fmt: skip
            first = planner.propose(state)
            check(first, state)
            check(planner.propose(replace(state, current=first)), state)

    own = planner.planner
    assert isinstance(own, Splitwise) and own.policy.spec == recipe.spec
    differed = 0
    for cell in CELLS:
        env = VectorEnv(cell, CLIMATE, spec=recipe.spec, num_instances=16, num_slots=SLOTS,
                        leave_out=frozenset(recipe.leave_out), rng=np.random.default_rng(5))  # fmt: skip
        decide = learned(act_of(modules), recipe.spec)
        served = Served(cell.topology, Rates.of(cell.topology), env.grid, env.known, env.static, env._history, True)
        for _ in range(SLOTS):
            for rows in env.turns:
                high, low = decide(env, rows)  # by RLlib's networks, as in training
                executed, kept = env.decide(high, low, rows), env.choice.take(rows)
                ours = own.chosen(served, env._moment(rows), CLIMATE.request, env.features(rows))
                waits = env.simulator.next_tokens[rows] > 1  # else the environment leaves all as it is
                assert ours.same_as(executed)[waits].all()
                differed += int((~executed.same_as(kept))[waits].sum())
                env.act(high, low, rows)
            env.serve()
    assert differed, "the test is about something"
