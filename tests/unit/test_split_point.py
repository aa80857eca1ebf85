"""Where to cut: the decision process by hand, the exact program against brute force, and qualities."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from splitray.channel import as_channel
from splitray.errors import InputError
from splitray.quality.features import PlaceFeatures
from splitray.quality.surrogate import shipped_surrogate
from splitray.quality.table import shipped_quality
from splitray.rl.split_point.policies import greedy, judge, optimal, stay, uniform
from splitray.rl.split_point.process import (
    AS_CODED,
    AS_CODED_MEASURED,
    AS_PRINTED,
    LEVELS,
    STEPS,
    SplitErrata,
    SplitPoint,
    States,
)
from splitray.rl.split_point.quality import InLoopQuality, MeasuredQuality, SurrogateQuality, learned_from

# Rises with the strength, falls with the cut: three strengths, cuts 1 to 11.
TRADE = MeasuredQuality(
    levels=np.array([0.0, 0.1, 0.3]),
    by_level=np.array([[1.0] * 11, [1 + 0.5 / p for p in range(1, 12)], [1 + 3.0 / p for p in range(1, 12)]]),
)
MDP = SplitPoint(quality=TRADE)


def at(noise: float, cut: int, step: int = 0, mdp: SplitPoint = MDP) -> States:
    return States(np.array([noise]), np.array([cut]), mdp.relative(np.array([noise]), np.array([cut])), step)


@pytest.mark.parametrize(
    ("reach", "cut", "action", "expected"),
    [(1, 5, 0, 5), (1, 5, 1, 4), (1, 5, 2, 6), (1, 1, 1, 1), (1, 10, 2, 10), (4, 2, 7, 1), (4, 5, 8, 9), (4, 8, 8, 10)],
)
def test_an_action_moves_the_cut_as_far_as_it_can(reach, cut, action, expected) -> None:
    mdp = replace(MDP, reach=reach)
    assert mdp.num_actions == 2 * reach + 1
    after, _ = mdp.step(at(0.2, cut), np.array([action]))
    assert after.cut[0] == expected and after.step == 1
    assert after.noise[0] == pytest.approx(0.2 * (1 - 0.0005 * (expected - cut)))


def test_the_codes_own_steps_can_be_had() -> None:
    coded = replace(MDP, reach=3, errata=AS_CODED)
    assert coded.step(at(0.2, 3, mdp=coded), np.array([6]))[0].noise[0] == pytest.approx(0.2 * 0.9995)  # +3, the slip
    assert coded.step(at(0.2, 5, mdp=coded), np.array([5]))[0].noise[0] == pytest.approx(0.2 * 1.0015)  # -3
    named = replace(MDP, errata=AS_CODED_MEASURED)
    after, _ = named.step(at(0.2, 3, mdp=named), np.array([8]))
    assert named.num_actions == 10 and after.cut[0] == 9 and after.noise[0] == pytest.approx(0.2 * 0.9995)
    assert coded.relative(np.array([0.3]), np.array([4])) == pytest.approx(1 + 3 / 5)  # a layer later


def test_rewards_by_hand() -> None:
    start = at(0.3, 2)  # 2.5 times the exact perplexity
    assert MDP.reward(np.array([2.0]), np.array([3]), start.first) == pytest.approx(10.5 * (1 - 2 / 2.5) + 0.7)
    after, reward = MDP.step(start, np.array([2]))
    assert reward == pytest.approx(MDP.reward(MDP.relative(after.noise, after.cut), after.cut, start.first))
    printed = replace(MDP, errata=AS_PRINTED, perplexity=20.0, load_price=2.0)
    assert printed.step(start, np.array([0]))[1] == pytest.approx(-(20 * 2.5 + 2 * 2))


def test_no_printed_reward_is_above_minus_one() -> None:
    printed = replace(MDP, errata=AS_PRINTED, load_price=0.0)
    starts = printed.starts(np.random.default_rng(0), 200)
    for action in range(3):
        assert (printed.step(starts, np.full(200, action))[1] <= -1).all()


@pytest.mark.parametrize(
    ("case", "noise", "cuts"),
    [("L", (0, 0.1), (1, 5)), ("H", (0.1, 0.3), (6, 10)), ("A", (0, 0.3), (1, 10)), ("coded", (0.01, 0.3), (1, 9))],
)
def test_episodes_begin_where_their_case_says(case, noise, cuts) -> None:
    starts = replace(MDP, case=case).starts(np.random.default_rng(0), 4000)
    assert starts.noise.min() >= noise[0] and starts.noise.max() <= noise[1]
    assert starts.noise.max() - starts.noise.min() > 0.95 * (noise[1] - noise[0])
    assert (starts.cut.min(), starts.cut.max()) == cuts


def test_what_the_agent_sees_is_within_one_and_shows_the_first_perplexity_and_the_steps_left() -> None:
    starts = MDP.starts(np.random.default_rng(0), 100)
    seen = MDP.observe(starts)
    assert seen.shape == (100, 4) and np.abs(seen[:, [0, 1, 3]]).max() <= 1
    np.testing.assert_allclose(seen[:, 2], np.log(starts.first), rtol=1e-6)
    after, _ = MDP.step(starts, np.zeros(100, int))
    np.testing.assert_allclose(MDP.observe(after)[:, 3], 1 - 1 / STEPS, rtol=1e-6)
    bare = replace(MDP, errata=SplitErrata.BARE_STATE)
    np.testing.assert_allclose(bare.observe(starts), np.stack([starts.noise, starts.cut], 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("reach", "errata"), [(1, SplitErrata(0)), (2, SplitErrata(0)), (1, AS_CODED), (1, AS_PRINTED)]
)
def test_the_program_gets_what_the_best_of_all_sequences_gets(reach, errata) -> None:
    mdp = replace(MDP, reach=reach, errata=errata)
    starts = mdp.starts(np.random.default_rng(1), 12)
    best = np.full(12, -np.inf)
    for actions in itertools.product(range(mdp.num_actions), repeat=STEPS):
        states, total = starts, np.zeros(12)
        for action in actions:
            states, reward = mdp.step(states, np.full(12, action))
            total += reward
        best = np.maximum(best, total)
    np.testing.assert_allclose(judge(mdp, optimal(mdp), starts).returns, best, rtol=1e-12)


def test_over_a_channel_of_its_own_the_program_weighs_all_that_may_come() -> None:
    mdp = replace(MDP, channel="exogenous")
    strength_L, chances = mdp.strength(np.arange(LEVELS)), mdp.transitions
    np.testing.assert_allclose(chances.sum(1), 1)

    def value(noise: float, cut: int, first: float, left: int) -> list[float]:
        """Of each action, by recursion."""
        found = []
        for action in range(mdp.num_actions):
            after = int(mdp.target(np.array([cut]), np.array([action]))[0])
            relative_L = mdp.relative(strength_L, np.full(LEVELS, after))
            reward_L = mdp.reward(relative_L, np.array(after), np.array(first))
            if left > 1:
                reward_L = reward_L + np.array([max(value(x, after, first, left - 1)) for x in strength_L])
            found.append(float(chances[mdp.level(np.array(noise))] @ reward_L))
        return found

    choose = optimal(mdp)
    for level, cut in ((4, 1), (15, 3), (29, 2), (10, 6)):
        for left in (1, 2):
            state = at(float(mdp.strength(np.array(level))), cut, STEPS - left, mdp)
            values = value(state.noise[0], cut, state.first[0], left)
            assert values[choose(state)[0]] == pytest.approx(max(values))


@pytest.mark.parametrize("channel", ["endogenous", "exogenous"])
def test_policies_stand_in_their_order_and_see_the_same_channel(channel) -> None:
    mdp = replace(MDP, channel=channel)
    starts = mdp.starts(np.random.default_rng(0), 2000)
    found = [
        judge(mdp, p, starts) for p in (optimal(mdp), greedy(mdp), stay(mdp), uniform(mdp, np.random.default_rng(1)))
    ]
    means = [j.returns.mean() for j in found]
    chance = 0.05 if channel == "exogenous" else 0.0  # what the draws of an average may do to a mean
    assert means[0] >= means[1] - chance and means[1] > means[3] and means[0] > means[2]
    if channel == "exogenous":
        np.testing.assert_array_equal(found[0].noise, found[3].noise)


def test_a_longer_reach_is_never_worse() -> None:
    starts = MDP.starts(np.random.default_rng(0), 40)
    means = [judge(m, optimal(m), starts).returns.mean() for m in (replace(MDP, reach=u) for u in (1, 2, 3))]
    assert means == sorted(means) and means[0] < means[1]


def test_measured_qualities_are_the_tables_and_lines_between() -> None:
    table = shipped_quality()
    measured = MeasuredQuality.of_table(table, "loss")
    assert measured.last_cut == 11 and measured.strongest == 0.3
    first, second = (table.relative_perplexity(f"loss:{x}", "none", "cut:4") for x in ("0.06", "0.1"))
    told = measured.relative(np.array([0.06, 0.08, 0.1, 0.0]), np.array([4, 4, 4, 4]))
    np.testing.assert_allclose(told, [first, (first + second) / 2, second, 1.0], rtol=1e-12)


def test_the_surrogates_qualities_are_its_predictions() -> None:
    table, surrogate = shipped_quality(), shipped_surrogate()
    for noise in ("loss", "sigma"):
        measured = MeasuredQuality.of_table(table, noise)
        told = SurrogateQuality.beside(measured, surrogate, model="tiny", num_layers=12, noise=noise)
        x, p = measured.strongest / 2, 7
        expected = surrogate.predict("tiny", PlaceFeatures.of_cut(p, 12), as_channel(f"{noise}:{x}"))
        found = told.relative(np.array([x, 0.0]), np.array([p, p]))
        np.testing.assert_allclose(found, [expected, 1.0], rtol=1e-9)
        strengths, cuts_at = np.meshgrid(measured.levels[1:], np.arange(1, 12))
        grid, cuts = strengths.ravel(), cuts_at.ravel()
        assert np.abs(told.relative(grid, cuts) - np.minimum(measured.relative(grid, cuts), 4)).mean() < 0.06


@pytest.mark.parametrize("noise", ["sigma", "loss"])
def test_what_is_best_by_the_shipped_surrogate_is_nearly_best_by_the_table(noise) -> None:
    table = shipped_quality()
    measured = MeasuredQuality.of_table(table, noise)
    told = SurrogateQuality.beside(measured, shipped_surrogate(), model="tiny", num_layers=12, noise=noise)
    truth = SplitPoint(quality=measured)
    starts = truth.starts(np.random.default_rng(1), 300)
    found, best = (judge(truth, optimal(mdp), starts).returns.mean() for mdp in (SplitPoint(quality=told), truth))
    assert found >= 0.994 * best


def test_algorithm_1_measures_for_some_epochs_and_then_asks_its_surrogate() -> None:
    told = learned_from(
        "in_loop", TRADE, shipped_surrogate(), model="tiny", num_layers=12, noise="loss", updates=2
    )  # fmt: skip
    assert isinstance(told, InLoopQuality)
    told.loop.steps = 300
    rng = np.random.default_rng(0)
    for _ in range(2):
        noise, cut = rng.uniform(0, 0.3, 60), rng.integers(1, 12, 60)
        np.testing.assert_allclose(told.relative(noise, cut), TRADE.relative(noise, cut))
        told.end_epoch()
    assert told.loop.switched_at == 2 and len(told.loop.records) == 120
    assert np.abs(told.relative(noise, cut) - TRADE.relative(noise, cut)).mean() < 0.1
    assert len(told.loop.records) == 120


REFUSED = {
    "a reach of none": (lambda: replace(MDP, reach=0), "1 to 4 layers"),
    "a reach of five": (lambda: replace(MDP, reach=5), "1 to 4 layers"),
    "no such case": (lambda: replace(MDP, case="X"), "one of L, H, A"),  # type: ignore[arg-type]
    "a cut beyond what was measured": (lambda: replace(MDP, last_cut=12), "2 to 11"),
    "a cut beyond, one layer later": (lambda: replace(MDP, last_cut=11, errata=AS_CODED), "2 to 10"),
    "a table without the channel": (
        lambda: MeasuredQuality.of_table(replace(shipped_quality(), rows=()), "sigma"), "channels sigma:VALUE",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(make, expected) -> None:
    with pytest.raises(InputError) as refused:
        make()
    assert expected in str(refused.value)
