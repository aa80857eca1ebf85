"""Re-placement: moves where it pays, rests where a link flips to and fro, and never changes a token."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from families import family_model
from splits import greedy, link_of, slow_devices, split

from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.engine.controller import (
    Action,
    Allowance,
    Controller,
    Desired,
    Gate,
    Observed,
    attend,
    next_action,
)
from splitray.runtime.engine.monitor import Estimates, Monitor
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.sampling import Sampling
from splitray.runtime.timing import echo
from splitray.topology import DeviceId, Topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEAR, FAR = (
    Placement((LayerPlacement(Shares.whole(2, d), Shares.whole(8, d)),), (d,), Shares.whole(9, d))
    for d in (DeviceId("a"), DeviceId("b"))
)
INFINITE = float("inf")


def asked(
    *, wanted=FAR, now_s=0.10, then_s=0.05, copy_s=0.4, read_s=INFINITE, left=100, moving=False, allowed_s=INFINITE
) -> Action:
    desired = Desired(placement=wanted, tpot_s=then_s, copy_s=copy_s, read_s=read_s)
    observed = Observed(placement=NEAR, tpot_s=now_s, tokens_left=left, moving=moving, allowed_s=allowed_s)
    return next_action(desired, observed, Gate())


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        ({}, "move", "gains 50%"),
        ({"moving": True}, "stay", "under way"),
        ({"wanted": NEAR}, "stay", "nothing better"),
        ({"then_s": 0.096}, "stay", "less than 5%"),
        ({"then_s": 0.2}, "stay", "less than 5%"),
        ({"left": 5}, "stay", "do not pay"),
        ({"copy_s": 20.0}, "stay", "do not pay"),
        ({"copy_s": 20.0, "read_s": 0.1}, "move", "0.20 s"),
        ({"allowed_s": 0.2}, "stay", "may cost 0.20 s now, this one 0.30 s"),
        ({"allowed_s": 0.4}, "move", "gains"),
        ({"now_s": INFINITE, "allowed_s": 0, "left": 0}, "move", "cannot go on"),
        ({"now_s": INFINITE, "then_s": INFINITE}, "stay", "cannot run either"),
    ],
)
def test_what_is_done(case, kind, why):
    action = asked(**case)
    assert action.kind == kind and why in action.why


def test_kv_is_copied_where_that_costs_the_run_less_than_reading_again():
    assert asked(copy_s=1.0, read_s=0.6).copies_kv
    assert not asked(copy_s=1.0, read_s=0.4).copies_kv
    assert not asked(now_s=INFINITE).copies_kv, "from where it is nothing can be copied"


@pytest.mark.parametrize("period", [3, 20, 200])
def test_a_link_that_oscillates_costs_no_more_than_the_allowance(period):
    """It flips for 4,000 tokens between regimes in which either placement is twice as fast; a move costs 1.1 s."""
    gate, current, moves, now_s, stayed_s = Gate(), NEAR, 0, 0.0, 0.0
    allowance = Allowance(gate, 0.0)
    for token in range(4000):
        good, bad = (FAR, NEAR) if token // period % 2 else (NEAR, FAR)
        price = {good: 0.05, bad: 0.10}
        if token % 4 == 0:
            desired = Desired(placement=good, tpot_s=price[good], read_s=1.0, copy_s=INFINITE)
            observed = Observed(placement=current, tpot_s=price[current], tokens_left=4000 - token, moving=False,
                                allowed_s=allowance.at(now_s))  # fmt: skip
            action = next_action(desired, observed, gate)
            if action.kind == "move":
                assert not action.copies_kv
                allowance.left_s -= action.cost_s
                current, moves, now_s = good, moves + 1, now_s + 1.0
        now_s, stayed_s = now_s + price[current], stayed_s + price[NEAR]
    assert moves * 1.1 <= gate.first_s + gate.share * now_s
    if period == 200:
        assert moves >= 10 and now_s < stayed_s, "slow changes are followed"


def test_a_link_that_falls_moves_the_run_and_no_token_changes(monkeypatch):
    slow_devices(monkeypatch, 0.01)
    model = family_model("llama")
    good = Topology.uniform(2)
    links = tuple(replace(x, bandwidth_bytes_per_s=1e3, rtt_s=2.0) for x in good.links)
    bad, now = replace(good, links=links), [good]
    with split(model, topology=good, planner="even", recovery=Recovery()) as engine:
        planner = make_planner("best_device")
        controller = Controller(engine=engine, planner=planner, topology=lambda: now[0], gate=Gate(gain=0.3))
        controller.start()
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, Sampling(max_new_tokens=100))):
            tokens.append(token)
            if n == 10:
                now[0] = bad
        controller.close()
        assert tokens == greedy(model, PROMPT, 100)
        moved = [d for d in controller.decisions if d.action.kind == "move"]
        assert moved and len(engine.placement.devices) == 1
        assert moved[-1].predicted_tpot_s < moved[-1].current_tpot_s


def test_the_monitor_measures_links_and_smooths_them():
    model = family_model("llama")
    with split(model, devices=2, planner="even") as engine:
        monitor = Monitor(engine=engine)
        monitor.look(engine.now.dials())
        (a, b) = engine.topology.ids
        found = monitor.topology()
        assert link_of(found, a, b).bandwidth_bytes_per_s != link_of(engine.topology, a, b).bandwidth_bytes_per_s
        assert 0 < link_of(found, a, b).rtt_s < 1 and link_of(found, b, a).bandwidth_bytes_per_s > 1e5
        pair, at = (a, b), time.monotonic()
        smooth = Estimates()
        for rate in (1e6, 1.2e6, 1e7):
            smooth.take(pair, rate, 0.01, at)
        assert smooth.links[pair].bandwidth_bytes_per_s == 1e7, "a jump counts whole"
        smooth.take(pair, 1.2e7, 0.01, at)
        assert smooth.links[pair].bandwidth_bytes_per_s == pytest.approx(1.1e7)
        smooth.take(pair, 0.0, 0.0, at)
        assert smooth.seen(engine.topology, at).link(a, b) is None, "no answer, no link"
        assert smooth.seen(engine.topology, at + 60).link(a, b) == engine.topology.link(a, b), "stale"


def test_the_links_of_three_devices_are_timed_pair_by_pair():
    with split(family_model("llama"), devices=3, planner="even") as engine:
        for a, b in (("edge0", "cloud0"), ("edge0", "cloud1"), ("cloud0", "cloud1")):
            assert len(echo(engine, a, b, size=64, rounds=3)) == 3
        engine.migrate(make_planner("random", seed=3).propose(ClusterState(arch=engine.arch, topology=engine.topology)))
        next_epoch = engine.next
        assert next_epoch is not None and next_epoch.done.wait(20) and next_epoch.error is None
        assert len(echo(engine, "edge0", "cloud1", size=64, rounds=3)) == 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_link_that_slows_down_is_measured_and_left_and_taken_again_when_it_is_back(monkeypatch):
    """The whole loop: emulated links, probes, a planner, moves; and no token changes."""
    model = family_model("llama")
    calibrated = Topology.uniform(2)
    devices = tuple(
        replace(d, compute_flops=1e9 * (1 + 9 * (d.tier == "cloud")), launch_s=0.0) for d in calibrated.devices
    )
    topology = replace(calibrated, devices=devices, origin_holds="embedding_and_head")
    with split(model, topology=topology, planner="even", recovery=Recovery()) as engine:
        monitor = Monitor(engine, period_s=0.2)
        engine.slow_links(20e3)
        monitor.look(engine.now.dials())
        for pair in (("edge0", "cloud0"), ("cloud0", "edge0")):
            assert link_of(monitor.topology(), *pair).bandwidth_bytes_per_s == pytest.approx(20e3, rel=0.5)
        engine.slow_links(0.0)
        monitor.look_at_devices()
        seen = monitor.topology().device(DeviceId("edge0"))
        assert 0 < seen.memory_bytes < 1e12 and 0 < seen.compute_flops <= devices[0].compute_flops
        with closing(attend(engine, "best_device")) as controller:
            tokens = list(engine.stream(PROMPT, Sampling(max_new_tokens=60)))
            assert tokens == greedy(model, PROMPT, 60)
            assert controller.decisions
