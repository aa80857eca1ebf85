"""Trying out the future: branches leave the present alone, foresight is worth something, and teaching teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitray.rl.training.clairvoyant import CANDIDATES, ahead, foreseen
from splitray.rl.training.foresight import foresee
from splitray.rl.training.holdout import learned, program, score
from splitray.rl.training.learner import act_of
from splitray.rl.training.module import module_specs
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.action import DEFAULT_KNOBS, FREE, ActionSpec
from splitray.rl.world.cell import Cell
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate

CELL, BUSY = Cell("jetson-orin-nx-16gb", "llama-7b"), Climate(cloud_load=0.95, bandwidth_sigma=0.3)
SPEC = ActionSpec()
DEFAULT = [FREE] * 12 + list(DEFAULT_KNOBS)


def made(slots: int) -> VectorEnv:
    """One that has been going on for some slots."""
    env = VectorEnv(CELL, BUSY, spec=SPEC, num_instances=16, num_slots=96, rng=np.random.default_rng(2))
    for _ in range(slots):
        env.step(np.tile(DEFAULT, (16, 1)))
    return env


def test_a_state_that_is_restored_goes_on_as_it_would_have() -> None:
    env, high = made(20), np.tile(DEFAULT, (16, 1))
    state = env.state()
    first = [env.step(high).rewards for _ in range(12)]
    env.restore(state, np.arange(16))
    assert (np.array(first) == np.array([env.step(high).rewards for _ in range(12)])).all()


def test_branches_say_what_each_candidate_brings_and_leave_the_present_alone() -> None:
    env = made(30)
    twin = made(30)
    cost = ahead(env, 10)
    assert cost.shape == (len(CANDIDATES), 1) and (cost > 0).all()
    same = CANDIDATES.index(DEFAULT_KNOBS)
    paid = 0.0
    for _ in range(10):
        terms = twin.step(np.tile(DEFAULT, (16, 1))).terms
        paid -= sum(float(v.sum()) for k, v in terms.items() if k != "congestion")
    left = twin.weights.latency * float(twin.simulator.backlog_requests.sum())
    np.testing.assert_allclose(cost[same, 0], paid + left, rtol=1e-4)  # rounds of splitray/sim/crowd.py end together
    assert env.slot == 30


@pytest.mark.full
def test_who_knows_the_future_waits_less_than_the_program() -> None:
    usual = score(program(), CELL, BUSY, spec=SPEC, seed=4, num_instances=16, num_slots=64).latency_s
    best = foreseen((program(),), CELL, BUSY, spec=SPEC, seed=4, num_edges=16, num_slots=64)
    assert np.nanmean(best) < 0.99 * np.nanmean(usual)


@pytest.mark.full
def test_a_taught_agent_waits_less_than_the_program() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = Recipe(
        name="taught", cells=(CELL,), climates=(BUSY,), num_envs=2, num_instances=16, num_slots=96, clone_steps=0,
        foresight_steps=36, foresight_slots=12, hidden=32,
    )  # fmt: skip
    modules = {agent: spec.build() for agent, spec in module_specs(recipe).items()}
    foresee(modules, recipe, np.random.default_rng(0))
    waits = [
        np.nanmean(score(d, CELL, BUSY, spec=SPEC, seed=8, num_instances=32, num_slots=96).latency_s)
        for d in (learned(act_of(modules), SPEC), program())
    ]
    assert waits[0] < 0.97 * waits[1]
