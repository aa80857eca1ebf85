"""Re-placement: moves where it pays, rests where a link flips to and fro, and never changes a token."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from families import family_model
from splits import greedy, slow_devices, split

from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.runtime.controller import Action, Controller, Desired, Gate, History, Observed, next_action
from splitray.runtime.monitor import Monitor
from splitray.runtime.recovery import Recovery
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEAR, FAR = (
    Placement((LayerPlacement(Shares.whole(2, d), Shares.whole(8, d)),), (d,), Shares.whole(9, d)) for d in ("a", "b")
)
INFINITE = float("inf")


def asked(
    *, wanted=FAR, now_s=0.10, then_s=0.05, copy_s=0.4, read_s=INFINITE, left=100, moving=False, since=1000, returns=0
) -> Action:
    desired = Desired(placement=wanted, tpot_s=then_s, copy_s=copy_s, read_s=read_s)
    observed = Observed(placement=NEAR, tpot_s=now_s, tokens_left=left, moving=moving, since_move_tokens=since)
    return next_action(desired, observed, Gate(), returns=returns)


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        ({}, "move", "gains 50%"),
        ({"moving": True}, "stay", "under way"),
        ({"wanted": NEAR}, "stay", "nothing better"),
        ({"then_s": 0.095}, "stay", "less than 10%"),
        ({"then_s": 0.2}, "stay", "less than 10%"),
        ({"left": 5}, "stay", "do not pay"),
        ({"copy_s": 20.0}, "stay", "do not pay"),
        ({"copy_s": 20.0, "read_s": 0.1}, "move", "0.20 s"),
        ({"since": 10}, "stay", "rests for 16"),
        ({"since": 40, "returns": 2}, "stay", "rests for 64"),
        ({"since": 70, "returns": 2}, "move", "gains"),
        ({"now_s": INFINITE, "since": 0, "left": 0}, "move", "cannot go on"),
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


def test_an_oscillating_link_is_not_followed_for_ever():
    """The link flips every 20 tokens for 2,000 tokens: rests double, so that moves grow with the logarithm."""
    history, current, moved_at, moves = History(), NEAR, -1000, 0
    for token in range(0, 2000, 4):
        good, bad = (FAR, NEAR) if token // 20 % 2 else (NEAR, FAR)
        price = {good: 0.05, bad: 0.10}
        desired = Desired(placement=good, tpot_s=price[good], copy_s=0.02)
        observed = Observed(
            placement=current, tpot_s=price[current], tokens_left=2000 - token, moving=False,
            since_move_tokens=token - moved_at,
        )  # fmt: skip
        if next_action(desired, observed, Gate(), returns=history.returns).kind == "move":
            history.moved(current, good)
            current, moved_at, moves = good, token, moves + 1
    assert 2 <= moves <= 10


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
        assert found.link(a, b).bandwidth_bytes_per_s != engine.topology.link(a, b).bandwidth_bytes_per_s
        assert 0 < found.link(a, b).rtt_s < 1 and found.link(b, a).bandwidth_bytes_per_s > 1e5
        pair, at = (a, b), time.monotonic()
        monitor.estimates.clear()
        for rate in (1e6, 1.2e6, 1e7):
            monitor.take(pair, rate, 0.01, at)
        assert monitor.estimates[pair].bandwidth_bytes_per_s == 1e7, "a jump counts whole"
        monitor.take(pair, 1.2e7, 0.01, at)
        assert monitor.estimates[pair].bandwidth_bytes_per_s == pytest.approx(1.1e7)
        monitor.take(pair, 0.0, 0.0, at)
        assert monitor.seen(engine.topology, at).link(a, b) is None, "no answer, no link"
        assert monitor.seen(engine.topology, at + 60).link(a, b) == engine.topology.link(a, b), "stale"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
