"""RLlib's side: the environment's contract, the two critics' loss, cloning, and that learning learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rllib_configs.__main__ import RECIPES
from splitray.rl.training.algorithm import config_of
from splitray.rl.training.env import PlacementEnv, spaces_of
from splitray.rl.training.export import export, read_modules
from splitray.rl.training.holdout import learned, paired, program, score
from splitray.rl.training.learner import act_of, training_data
from splitray.rl.training.module import choice_log_probabilities, module_specs, prior_divergence
from splitray.rl.training.recipe import Recipe
from splitray.rl.training.rollout import Collector
from splitray.rl.training.warm_start import clone
from splitray.rl.world.action import imitated, prior
from splitray.rl.world.cell import Cell
from splitray.rl.world.choosing import log_probability
from splitray.rl.world.observation import table_hash
from splitray.rl.world.rows import AGENTS, HEAD_FFN_AGENT, LAYER_AGENT, layouts
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate

CELL = Cell("jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head")
USERS = 4
TINY = Recipe(
    name="tiny", variant="dp_modes", cells=(CELL,), climates=(Climate(users=USERS),), num_envs=2, num_instances=8,
    num_slots=16, rollout_slots=8, iterations=4, minibatch_slots=64, hidden=16, clone_steps=40,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def modules_of(recipe: Recipe):
    torch.manual_seed(recipe.seed)
    return {agent: spec.build() for agent, spec in module_specs(recipe).items()}


@pytest.mark.parametrize("variant", ["dp_knobs", "dp_modes", "no_dp"])
def test_rllibs_environment_keeps_its_contract_and_pays_what_the_vectorised_one_pays(variant) -> None:
    recipe = replace(TINY, variant=variant)
    env = PlacementEnv({"recipe": recipe})
    for agent in AGENTS:
        env.action_spaces[agent].seed(0)
    rows, _ = env.reset(seed=5)
    assert (env.reset(seed=5)[0][LAYER_AGENT] == rows[LAYER_AGENT]).all()
    assert (env.reset(seed=6)[0][LAYER_AGENT] != rows[LAYER_AGENT]).any()
    rows, _ = env.reset(seed=5)
    rng = np.random.default_rng(5)
    rng.integers(1), rng.integers(1)  # the cell and the climate
    twin = VectorEnv(CELL, recipe.climates[0], spec=recipe.spec, num_instances=USERS, num_slots=16, rng=rng)
    mine = np.array([0])
    act = act_of(modules_of(recipe))
    from splitray.rl.world.choosing import greedy

    for slot in range(16):
        assert list(rows) == [LAYER_AGENT] and env.observation_spaces[LAYER_AGENT].contains(rows[LAYER_AGENT])
        high = greedy(layouts(recipe.spec)[LAYER_AGENT].blocks, act(LAYER_AGENT, rows[LAYER_AGENT][None])[0])
        assert env.action_spaces[LAYER_AGENT].contains(high[0])
        rows, rewards, ended, cut, _ = env.step({LAYER_AGENT: high[0]})
        assert list(rows) == [HEAD_FFN_AGENT] and rewards == {LAYER_AGENT: 0.0} and not ended["__all__"]
        assert env.observation_spaces[HEAD_FFN_AGENT].contains(rows[HEAD_FFN_AGENT])
        low = greedy(layouts(recipe.spec)[HEAD_FFN_AGENT].blocks, act(HEAD_FFN_AGENT, rows[HEAD_FFN_AGENT][None])[0])
        rows, rewards, ended, cut, infos = env.step({HEAD_FFN_AGENT: low[0]})
        twin.act(high, low, mine)
        for turn in twin.turns:
            rest = turn[turn != 0]
            if not len(rest):
                continue
            twin.act(*imitated(twin.spec, twin.expert(rest), twin.grid.num_heads), rest)
        expected = twin.serve().rewards[0].sum()
        assert rewards == dict.fromkeys(AGENTS, pytest.approx(expected, abs=1e-12))
        assert sum(infos[LAYER_AGENT]["terms"].values()) == pytest.approx(expected)
        assert cut["__all__"] is (slot == 15) and ended["__all__"] is False
        rows = {LAYER_AGENT: rows[LAYER_AGENT]} if slot < 15 else rows
    assert set(rows) == set(AGENTS)


def test_masked_choices_have_no_probability_and_the_fast_sums_are_the_distributions_own() -> None:
    recipe = replace(TINY, variant="no_dp")
    modules, collector = modules_of(recipe), Collector(recipe, np.random.default_rng(0))
    rollout = collector.collect(act_of(modules))
    for agent, s in rollout.samples.items():
        layout, x = layouts(recipe.spec)[agent], torch.from_numpy(s.rows)
        logits = modules[agent].logits(x)
        mask = s.rows[:, layout.mask_at :]
        at = 0
        for block in layout.blocks:
            part = logits[:, at : at + block.count * block.size].reshape(-1, block.count, block.size)
            legal = mask[:, at : at + block.count * block.size].reshape(-1, block.count, block.size)
            assert float(part.softmax(2)[torch.from_numpy(legal) == 0].detach().sum()) == 0.0
            at += block.count * block.size
        each, entropy = choice_log_probabilities(layout.blocks, logits, torch.from_numpy(s.actions))
        np.testing.assert_allclose(each.sum(1).detach(), s.log_probability, atol=1e-4)
        np.testing.assert_allclose(log_probability(layout.blocks, logits.detach().numpy(), s.actions),
                                   s.log_probability, atol=1e-4)  # fmt: skip
        theirs = modules[agent].get_train_action_dist_cls().from_logits(logits)
        np.testing.assert_allclose(theirs.logp(torch.from_numpy(s.actions)).detach(), s.log_probability, atol=1e-3)
        assert (entropy >= 0).all()


def test_a_learner_without_ray_takes_our_batches_and_changes_both_agents() -> None:
    torch.manual_seed(0)
    config = config_of(TINY)
    spaces = {agent: spaces_of(layout) for agent, layout in layouts(TINY.spec).items()}
    learner = config.build_learner(env=None, spaces=spaces)
    modules = {agent: learner.module[agent].unwrapped() for agent in AGENTS}
    clone(modules, TINY, np.random.default_rng(0))
    before = {a: {k: v.clone() for k, v in m.state_dict().items()} for a, m in modules.items()}
    collector, act = Collector(TINY, np.random.default_rng(0)), act_of(modules)
    for i in range(2):
        results = learner.update(
            training_data=training_data(collector.collect(act)),
            timesteps={"num_env_steps_sampled_lifetime": (i + 1) * TINY.batch_slots}, num_epochs=2, minibatch_size=64,
            shuffle_batch_per_epoch=True,
        )  # fmt: skip
    for agent, module in modules.items():
        changed = {k.split(".")[0] for k, v in module.state_dict().items() if (v != before[agent][k]).any()}
        assert {"whole", "group", "choose", "critic"} <= changed
        assert np.isfinite(float(results[agent]["total_loss"].peek()))


def test_the_prior_is_where_cloning_ends_and_divergence_from_it_is_never_negative() -> None:
    found = prior(TINY.spec, 0.7)
    for block in TINY.spec.high:
        assert sum(found[block.name]) == pytest.approx(1) and len(found[block.name]) == block.size
    assert prior(replace(TINY, variant="no_dp").spec, 0.7) == {}
    as_it = torch.tensor([p for b in TINY.spec.high for p in found[b.name] * b.count]).log()[None]
    assert prior_divergence(TINY.spec.high, as_it, found).item() == pytest.approx(0, abs=1e-5)
    assert prior_divergence(TINY.spec.high, as_it * 2, found).item() > 0.1


@pytest.mark.parametrize("recipe", [replace(TINY, variant="no_dp"), replace(TINY, variant="no_dp", bits=True)])
def test_a_clone_without_the_program_decides_as_the_program(recipe) -> None:
    modules = modules_of(recipe)
    told = clone(modules, replace(recipe, clone_steps=400), np.random.default_rng(0))
    assert told["layer_agent_agreement"] > 0.9 and told["head_ffn_agent_agreement"] > 0.9


@pytest.mark.full
def test_ppo_learns_to_price_moves_from_a_policy_that_does_not() -> None:
    """One knob is worth a tenth of the latency here, so that a few dozen updates have to show."""
    windy = Climate(cloud_load=0.5, users=32, bandwidth_sigma=0.8)
    recipe = replace(
        TINY, variant="dp_knobs", climates=(windy,), num_envs=1, num_instances=32, num_slots=128,
        rollout_slots=16, iterations=24, minibatch_slots=256, clone_steps=0, learning_rate=3e-3, hidden=32,
    )  # fmt: skip
    torch.manual_seed(0)
    spaces = {agent: spaces_of(layout) for agent, layout in layouts(recipe.spec).items()}
    learner = config_of(recipe).build_learner(env=None, spaces=spaces)
    modules = {agent: learner.module[agent].unwrapped() for agent in AGENTS}
    collector, act = Collector(recipe, np.random.default_rng(0)), act_of(modules)
    for i in range(recipe.iterations):
        learner.update(
            training_data=training_data(collector.collect(act)),
            timesteps={"num_env_steps_sampled_lifetime": (i + 1) * recipe.batch_slots}, num_epochs=4,
            minibatch_size=256, shuffle_batch_per_epoch=True,
        )  # fmt: skip
    scores = [
        score(d, CELL, windy, spec=recipe.spec, seed=9, num_instances=32, num_slots=96)
        for d in (learned(act, recipe.spec), program(stay=0))
    ]
    assert paired(scores[0].latency_s, scores[1].latency_s).high < 0.97


def test_a_policy_goes_out_as_tensors_and_a_card_and_comes_back(tmp_path: Path) -> None:
    modules = modules_of(TINY)
    tensors, card = export(modules, TINY, tmp_path / "new" / "policy", {"slots": 1})
    document = json.loads(card.read_text())
    assert document["features"] == table_hash() and document["recipe"]["name"] == "tiny"
    assert set(document["agents"]) == set(AGENTS) and not any("critic" in k for k in load_file(tensors))
    row = torch.rand(3, layouts(TINY.spec)[LAYER_AGENT].width)
    back = read_modules(TINY, tensors)
    assert torch.equal(back[LAYER_AGENT].logits(row), modules[LAYER_AGENT].logits(row))
    alone, card = export(modules_of(replace(TINY, variant="dp_knobs")), replace(TINY, variant="dp_knobs"),
                         tmp_path / "knobs")  # fmt: skip
    assert {k.split(".")[0] for k in load_file(alone)} == {LAYER_AGENT}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete(name: str) -> None:
    recipe = RECIPES[name](3)
    assert recipe.name == name and recipe.seed == 3 and recipe.num_slots % recipe.rollout_slots == 0
    assert recipe.num_instances % recipe.copies == 0
    config_of(recipe).validate()
    json.dumps(recipe.as_json(), allow_nan=False)
