"""Lines that share a cloud: who waits for whom, against queueing theory and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from splitray.rl.world.action import DEFAULT_KNOBS, FREE, ActionSpec
from splitray.rl.world.cell import Cell, references
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import USERS, Climate, users_of
from splitray.sim.crowd import delay_to_others, longer, others_there

CELL = Cell("raspberry-pi-5", "llama-7b")  # too slow an edge for anything but the cloud


def test_others_are_those_of_ones_own_pool() -> None:
    there = np.array([[0.0, 0.5], [0.0, 0.25], [0.0, 1.0], [0.0, 0.125]])
    others = others_there(there, np.array([0, 0, 1, 0]))
    assert others.tolist() == [[0, 0.375], [0, 0.625], [0, 0], [0, 0.75]]


def test_who_is_there_is_charged_for_all_that_wait_in_the_lines_that_are_there_too() -> None:
    there = np.array([[0.5], [0.25], [0.0]])
    harm = delay_to_others(there, np.array([1, 3, 9]), np.array([0, 0, 0]))
    assert harm[:, 0].tolist() == [0.5 * (3 * 0.25), 0.25 * (1 * 0.5), 0.0]


def test_who_is_slowed_down_is_there_longer_but_never_longer_than_there_is_time() -> None:
    pool, window = np.zeros(4, np.int64), np.ones((4, 1))
    busy = longer(np.ones((4, 1)), np.zeros((4, 1)), window, pool)
    assert busy == pytest.approx(np.ones((4, 1))), "four that never stop get a quarter each"
    few = longer(np.full((4, 1), 0.1), np.zeros((4, 1)), window, pool)
    n = few[0, 0]  # n = 0.1 (1 + 3 n)
    assert n == pytest.approx(0.1 / 0.7, rel=0.02)
    rng = np.random.default_rng(0)
    for _ in range(50):
        work, think = rng.uniform(0, 1, (2, 6, 1))
        there = longer(work, think * (1 - work), rng.uniform(0.5, 1, (6, 1)), np.zeros(6, np.int64))
        assert (there / (1 + others_there(there, np.zeros(6, np.int64)))).sum() <= 1.01


def test_the_charge_is_the_marginal_waiting_of_processor_sharing() -> None:
    """n others on average stay load / (1 - load), and a request is there for 1 / (1 - load) services."""
    load = 0.8
    others, stay = load / (1 - load), 1 / (1 - load)
    step = 1e-6
    waiting = [x / (1 - x) for x in (load, load + step)]  # requests there, so seconds a second
    assert others * stay == pytest.approx((waiting[1] - waiting[0]) / step - stay, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_cloud_alone_is_as_slow_as_queueing_theory_says(load: float) -> None:
    """M/G/1 with processor sharing: a request stays 1 / (1 - load) times as long as alone, whatever its length.

    Means over a slot in place of who overlaps with whom, and lines that serve one request at a time, add to that: it is
    never too quick, and at most 1.45 times as slow. The link's part is not stretched.
    """
    climate = Climate(cloud_load=load, bandwidth_sigma=0.0)
    env = VectorEnv(
        CELL, climate, spec=ActionSpec(), num_instances=64, num_slots=800, rng=np.random.default_rng(5),
    )  # fmt: skip
    high = np.tile([FREE] * 12 + list(DEFAULT_KNOBS), (64, 1))
    used = np.array([env.step(high).cloud_used.reshape(4, -1).sum(1) for _ in range(800)])
    assert used.max() < 1.05, "a cloud gives out no more than it has"
    assert used.mean() == pytest.approx(load, rel=0.1), "four clouds, each loaded as it was told"
    known, s = env.known, env.simulator
    latency = float(np.nanmean((s.finish_s - np.where(np.isfinite(s.arrival_s), s.arrival_s, np.nan))[:, :-1]))
    alone_s, drawn = known.cloud.device_s(climate.request), float(used.mean())
    book_s = alone_s / (1 - drawn) + known.service_s - alone_s
    print(f"load {drawn:.3f}: {latency:.2f} s, {book_s:.2f} by the book")
    assert 0.95 < latency / book_s < 1.45


def test_a_cloud_has_so_many_users_that_it_is_what_holds_them_up() -> None:
    light = Cell("jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head")
    for cell in (CELL, light):
        known = references(cell.arch, cell.topology)
        rate = Climate(cloud_load=0.95).rate_per_s(known)
        assert users_of(known) == USERS[-1] or rate * known.service_s < 0.6
    assert users_of(references(light.arch, light.topology)) > users_of(references(CELL.arch, CELL.topology))
