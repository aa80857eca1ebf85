"""The simulator that policies learn on: masks, seeds, rewards term by term, and RLlib's view of the same."""

from __future__ import annotations

import numpy as np
import pytest

from splitray.rl.grid.choice import CLOUD, EDGE, SPLIT
from splitray.rl.world.action import AUTO, DEFAULT_KNOBS, FREE, ActionSpec, imitated, num_logits, parts
from splitray.rl.world.cell import Cell
from splitray.rl.world.choosing import MASKED, greedy, gumbel, log_probability, sample
from splitray.rl.world.observation import FEATURES, GROUP_FEATURES, NUM_GLOBAL, NUM_GROUP
from splitray.rl.world.reward import LYAPUNOV, PERFORMANCE, TERMS
from splitray.rl.world.rows import HEAD_FFN_AGENT, LAYER_AGENT, layouts
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate, Weather

PINNED = Cell("jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head")
BIG = Cell("raspberry-pi-5", "llama-7b", "none")  # does not fit its edge
BUSY = Climate(cloud_load=0.8, users=4, power_w=20.0)
SPECS = [
    ActionSpec(variant="dp_knobs"), ActionSpec(variant="dp_modes"), ActionSpec(variant="no_dp"),
    ActionSpec(variant="no_dp", bits=True),
]  # fmt: skip


def made(spec: ActionSpec, cell: Cell = PINNED, seed: int = 0, climate: Climate = BUSY, **more) -> VectorEnv:
    return VectorEnv(
        cell, climate, spec=spec, rng=np.random.default_rng(seed), **{"num_instances": 8, "num_slots": 24} | more
    )


def drawn(env: VectorEnv, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Legal actions of both agents, all alike."""
    both, rows = layouts(env.spec), env.high_rows()
    logits = _logits(rows, both[LAYER_AGENT])
    high, _ = sample(both[LAYER_AGENT].blocks, logits, gumbel(logits.shape, rng))
    rows = env.low_rows(high)
    logits = _logits(rows, both[HEAD_FFN_AGENT])
    low, _ = sample(both[HEAD_FFN_AGENT].blocks, logits, gumbel(logits.shape, rng))
    return high, low


def _logits(rows, layout) -> np.ndarray:
    return (1 - rows[:, layout.mask_at :]) * np.float32(MASKED)


@pytest.mark.parametrize("cell", [PINNED, BIG], ids=lambda c: c.model)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.variant}{'_bits' * s.bits}")
def test_masks_are_never_empty_rows_stay_in_bounds_and_every_placement_fits(spec, cell) -> None:
    env, rng = made(spec, cell), np.random.default_rng(1)
    for _ in range(12):
        high, low = drawn(env, rng)
        for rows, layout in ((env.high_rows(), layouts(spec)[LAYER_AGENT]),
                             (env.low_rows(high), layouts(spec)[HEAD_FFN_AGENT])):  # fmt: skip
            assert rows.shape == (8, layout.width) and rows.dtype == np.float32
            assert np.isfinite(rows).all() and np.abs(rows).max() <= 3
            at = layout.mask_at
            for block in layout.blocks:
                mask = rows[:, at : at + block.count * block.size].reshape(8, block.count, block.size)
                assert mask.any(2).all(), block
                at += block.count * block.size
        outcome = env.step(high, low)
        held = env.grid.memory_bytes(outcome.choice, env.longest)
        assert (held <= env.memory_bytes).all()


@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda s: s.variant)
def test_rewards_are_the_sum_of_their_terms_and_a_seed_gives_them_again(spec) -> None:
    runs = []
    for _ in range(2):
        env, rng = made(spec, seed=3), np.random.default_rng(2)
        outcomes = [env.step(*drawn(env, rng)) for _ in range(16)]
        runs.append(np.stack([o.rewards for o in outcomes]))
        for o in outcomes:
            assert tuple(o.terms) == TERMS and all((v <= 0).all() for v in o.terms.values())
            for column, names in enumerate((PERFORMANCE, LYAPUNOV)):
                np.testing.assert_allclose(o.rewards[:, column], sum(o.terms[n] for n in names), atol=1e-12)
    assert (runs[0] == runs[1]).all() and runs[0].std() > 0


def test_the_latency_term_sums_to_the_latency_of_all_requests() -> None:
    env = made(SPECS[0], num_slots=40)
    high = np.tile([FREE] * 12 + list(DEFAULT_KNOBS), (8, 1))
    total = np.zeros(8)
    while env.slot < 40 or env.simulator.backlog_requests.any():
        total -= env.step(high).terms["latency"]
        assert env.slot < 1000
    s = env.simulator
    there = np.isfinite(s.arrival_s)
    latency = np.where(there, s.finish_s - np.where(there, s.arrival_s, 0), 0).sum(1)
    np.testing.assert_allclose(total * env.known.service_s, latency, rtol=1e-9)
    assert latency.max() > 0


def test_the_virtual_energy_queue_fills_above_its_budget_only() -> None:
    high = np.tile([FREE] * 12 + list(DEFAULT_KNOBS), (8, 1))
    frugal, lavish = made(SPECS[0], climate=Climate(power_w=0.5)), made(SPECS[0], climate=Climate(power_w=1e9))
    totals = [
        sum(t["energy_queue"].sum() for t in [env.step(high).terms for _ in range(20)]) for env in (frugal, lavish)
    ]
    assert totals[0] < 0 == totals[1]


def test_without_the_program_the_agents_choice_is_the_placement() -> None:
    env = made(SPECS[2])
    high = np.tile([1 + EDGE] * 4 + [1 + SPLIT] * 4 + [1 + CLOUD] * 4 + list(DEFAULT_KNOBS), (8, 1))
    low = np.tile([0] * 4 + [4] * 4 + [0] * 4 + [0] * 4 + [2] * 4 + [0] * 4, (8, 1))
    choice = env.decide(high, low)
    assert (choice.mode == [EDGE] * 4 + [SPLIT] * 4 + [CLOUD] * 4).all()
    heads = round(4 * env.grid.num_heads / 8)
    assert (choice.heads[:, 4:8] == heads).all() and (choice.ffn[:, 4:8] == 4).all()
    again, shares = imitated(env.spec, choice, env.grid.num_heads)
    assert (again == high).all() and (parts(env.spec.low, shares)["ffn"][:, 4:8] == 2).all()


def test_what_is_fixed_stays_and_the_program_decides_the_rest() -> None:
    env = made(SPECS[1])
    high = np.tile([1 + CLOUD] + [FREE] * 10 + [1 + SPLIT] + list(DEFAULT_KNOBS), (8, 1))
    low = np.full((8, 24), AUTO)
    idle = env.simulator.next_tokens == 1
    assert env.decide(high, low).take(idle).same_as(env.choice.take(idle)).all(), "who serves nobody stays"
    while not (env.simulator.next_tokens > 1).all():
        env.step(high, low)
    choice = env.decide(high, low)
    assert (choice.mode[:, 0] == CLOUD).all() and (choice.mode[:, -1] == SPLIT).all()
    low[:, 11] = low[:, 23] = 8  # all heads and columns of the last group
    shared = env.decide(high, low)
    assert (shared.heads[:, -1] == env.grid.num_heads).all() and (shared.ffn[:, -1] == 16).all()


def test_groups_that_overflow_the_edge_are_sent_to_the_cloud_or_masked() -> None:
    env = made(SPECS[2], BIG)
    everything = np.tile([1 + EDGE] * 12 + list(DEFAULT_KNOBS), (8, 1))
    modes = env.decide(everything, np.zeros((8, 24), np.int64)).mode
    assert (modes[:, 0] == EDGE).all() and (modes[:, -1] == CLOUD).all()


def test_a_link_that_is_down_keeps_what_cannot_move() -> None:
    n, slots = 2, 8
    line = made(SPECS[2]).weather.requests[:n]
    weather = Weather(
        link_bytes_per_s=np.tile([1e6] * 3 + [0.0] * 5, (n, 1)), rtt_s=np.full((n, slots), 0.05),
        requests=line, pool=np.arange(n),
    )  # fmt: skip
    env = made(SPECS[2], weather=weather)
    there, here = (np.tile([1 + m] * 12 + list(DEFAULT_KNOBS), (n, 1)) for m in (CLOUD, EDGE))
    low = np.zeros((n, 24), np.int64)
    for t in range(slots):
        outcome = env.step(here if t >= 3 else there, low)
        assert np.isfinite(outcome.rewards).all()


def test_the_table_of_features_is_the_row() -> None:
    assert sum(f.size for f in FEATURES) == NUM_GLOBAL and sum(f.size for f in GROUP_FEATURES) == NUM_GROUP
    env = made(SPECS[0])
    layout = layouts(env.spec)[LAYER_AGENT]
    assert layout.width == NUM_GLOBAL + 12 * NUM_GROUP + num_logits(env.spec.high)
    bare = made(SPECS[0], leave_out=frozenset({"history", "placement"}))
    high = np.tile([FREE] * 12 + list(DEFAULT_KNOBS), (8, 1))
    for e in (env, bare):
        for _ in range(3):
            e.step(high)
    names = [f.kind for f in FEATURES for _ in range(f.size)]
    left_out = [i for i, kind in enumerate(names) if kind != "present"]
    assert (bare.high_rows()[:, left_out] == 0).all() and (env.high_rows()[:, left_out] != 0).any()


def test_copies_share_their_weather() -> None:
    env = made(SPECS[0], copies=4)
    assert env.copies == 2, "two clouds of four edges each"
    assert (env.weather.link_bytes_per_s[0] == env.weather.link_bytes_per_s[4]).all()
    assert (env.weather.link_bytes_per_s[0] != env.weather.link_bytes_per_s[1]).any()
    assert env.weather.pool.tolist() == [0] * 4 + [1] * 4


def test_what_is_masked_is_never_drawn_and_draws_follow_the_logits() -> None:
    blocks, rng = ActionSpec(num_groups=1).high, np.random.default_rng(0)
    logits = np.zeros((4000, num_logits(blocks)), np.float32)
    logits[:, 1:5] = MASKED
    logits[:, 5] = np.log(3.0)  # of the first knob's four: 3 to 1 each
    actions, logp = sample(blocks, logits, gumbel(logits.shape, rng))
    assert (actions[:, 0] == 0).all() and (greedy(blocks, logits)[:, 1] == 0).all()
    assert abs((actions[:, 1] == 0).mean() - 0.5) < 0.04
    np.testing.assert_allclose(logp, log_probability(blocks, logits, actions))
    np.testing.assert_allclose(logp[actions[:, 1] == 0][0], np.log(0.5 / 5 / 6), rtol=1e-4)
