"""Learning where to cut: RLlib's learners on our episodes, the policies' files, the recipe, and the suite."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns

from rllib_configs.split_point import SPLIT_RECIPES, run
from splitray.errors import InputError
from splitray.evaluate import layer_splitting, split_figures, split_runs
from splitray.evaluate.measured_reward import TimedReward
from splitray.evaluate.options import Options
from splitray.quality.surrogate import Surrogate
from splitray.quality.table import shipped_quality
from splitray.report.document import Number
from splitray.report.split_plots import loess
from splitray.rl.split_point.learning import _Run, advantages, train, untrained
from splitray.rl.split_point.network import SplitNetwork
from splitray.rl.split_point.policies import judge, optimal, uniform
from splitray.rl.split_point.quality import MeasuredQuality
from splitray.rl.split_point.recipe import SplitRecipe

RECIPE = SplitRecipe(name="test", noise="sigma", steps=4000)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mdp():
    return RECIPE.process(MeasuredQuality.of_table(shipped_quality(), "sigma"))


def test_advantages_are_the_sums_of_equation_12() -> None:
    rng = np.random.default_rng(0)
    reward, value, gamma, xi = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 0.9, 0.7
    after = np.vstack([value[1:], np.zeros((1, 3))])
    delta = reward + gamma * after - value
    expected = [sum((gamma * xi) ** k * delta[t + k] for k in range(5 - t)) for t in range(5)]
    np.testing.assert_allclose(advantages(reward, value, gamma=gamma, trace_decay=xi), expected)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "dqn"])
def test_the_policy_in_numpy_is_rllibs_module_and_learning_changes_it(mdp, algorithm) -> None:
    recipe = replace(RECIPE, algorithm=algorithm, steps=400)
    learner = _Run(recipe, mdp)
    before = learner.network()
    (learner.update_values if algorithm == "dqn" else learner.update_policy)()
    x = mdp.observe(mdp.starts(np.random.default_rng(0), 20))
    with torch.no_grad():
        batch = {Columns.OBS: torch.from_numpy(x)}
        told = (
            learner.module.compute_q_values(batch)["qf_preds"]
            if algorithm == "dqn"
            else learner.module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
        )
    np.testing.assert_allclose(learner.network().scores(x), told.numpy(), atol=1e-5)
    assert all((a[0] != b[0]).any() for a, b in zip(before.layers, learner.network().layers, strict=True))


def test_ppo_leaves_chance_and_the_untrained_behind_and_the_same_seed_gives_the_same(mdp) -> None:
    starts = mdp.starts(np.random.default_rng(1), 300)

    def got(network: SplitNetwork) -> float:
        return float(judge(mdp, network.policy(mdp), starts).returns.mean())

    looks: list[int] = []
    trained = train(RECIPE, mdp, lambda steps, network: looks.append(steps))
    best = judge(mdp, optimal(mdp), starts).returns.mean()
    chance = judge(mdp, uniform(mdp, np.random.default_rng(2)), starts).returns.mean()
    assert looks == list(range(400, 4001, 400)) and trained.steps == 4000 and trained.seconds > 0
    assert got(trained.network) > chance + 0.5 * (best - chance)
    assert got(trained.network) > got(untrained(RECIPE, mdp))
    short = replace(RECIPE, steps=400)
    first, second = (train(short, mdp).network.layers[0][0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_recipe_writes_a_policy_that_can_be_read_and_refuses_a_damaged_one(tmp_path: Path, mdp) -> None:
    recipe = replace(SPLIT_RECIPES["split_point_smoke"](3), steps=800)
    told: list[tuple[int, int]] = []
    document = run(recipe, tmp_path, lambda done, of: told.append((done, of)))
    folder = tmp_path / recipe.name
    assert told[-1] == (800, 800) and json.loads(json.dumps(document)) == document
    returns = document["returns"]
    assert returns["optimal"] >= max(returns.values()) and returns["learned"] != returns["untrained"]
    assert len((folder / "progress.csv").read_text().splitlines()) == 3
    card = json.loads((folder / "policy.json").read_text())
    assert card["recipe"]["seed"] == 3 and len(card["seen"]) == 4
    read = SplitNetwork.load(folder / "policy")
    starts = mdp.starts(np.random.default_rng(1), 500)
    assert judge(mdp, read.policy(mdp), starts).returns.mean() == pytest.approx(returns["learned"])
    with (folder / "policy.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="SHA-256"):
        SplitNetwork.load(folder / "policy")


def test_the_in_loop_recipe_switches_once_and_records_what_came_before_and_behind(tmp_path: Path, monkeypatch) -> None:
    recipe = replace(SPLIT_RECIPES["split_point_in_loop"](0), steps=1600, measured_updates=2)
    fit = Surrogate.fit
    monkeypatch.setattr(Surrogate, "fit", lambda records, *, steps, seed: fit(records, steps=50, seed=seed, folds=0))
    document = run(recipe, tmp_path, lambda done, of: None)
    rows = list(csv.DictReader((tmp_path / recipe.name / "progress.csv").open()))
    assert [row["next_rewards_from_surrogate"] for row in rows] == ["False", "True", "True", "True"]
    found = document["algorithm_1"]
    assert found["switched_at_update"] == 2 and found["measured_rewards"] >= 2 * 400
    assert found["return_at_switch"] == pytest.approx(float(rows[1]["judged_return"]))
    assert document["returns"]["learned"] == pytest.approx(float(rows[3]["judged_return"]))


def test_a_rollout_of_half_an_episode_is_refused() -> None:
    with pytest.raises(InputError, match="whole episodes"):
        replace(RECIPE, rollout_steps=402)


def test_a_loess_follows_a_line_and_a_bend() -> None:
    x = np.linspace(0, 1, 200)
    np.testing.assert_allclose(loess(x, 2 * x + 1, x[::20]), 2 * x[::20] + 1, atol=1e-9)
    assert np.abs(loess(x, x**2, x[::20], span=0.2) - x[::20] ** 2).max() < 0.01


@pytest.mark.full
def test_the_suite_says_where_every_number_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(split_runs, "STARTS", 20)
    monkeypatch.setattr(split_figures, "DECISIONS", 100)
    monkeypatch.setattr(layer_splitting, "timed_reward", lambda *_: TimedReward(80.0, 1e9, "not timed."))
    report = layer_splitting.run(Options(), lambda _: None, seeds=2, steps=400, swept=False)
    report.save(tmp_path)
    titles = [t.title for t in report.tables]
    for figure in ("Fig. 3", "Fig. 5", "Fig. 6", "Fig. 7", "Table 3", "Targets", "deviate"):
        assert any(figure in title for title in titles), figure
    assert {f"figure_{n}.png" for n in (3, 5, 6, 7)} <= {f.name for f in tmp_path.iterdir()}
    paper = [c for t in report.tables for r in t.rows for c in r if isinstance(c, Number) and c.provenance == "paper"]
    assert {n.shown for n in paper} == {"2.9736", "2.9663", "over 24 days", "462 s", "16.3 GB", "below 1 GB"}
    targets = {str(r[0]): r for r in next(t for t in report.tables if t.title == "Targets").rows}
    assert targets["sigma: training faster by"][3] == "yes"
    assert all(row[3] == "yes" for name, row in targets.items() if name.startswith(("surrogate", "int8")))
    assert len([t for t in titles if "tiny-neox" in t]) == 1 and "Monotone within noise (Fig. 3)" in titles
