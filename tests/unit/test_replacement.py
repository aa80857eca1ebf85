"""The suite `replacement`: a stream over a link that a trace drives, and who places it best."""

from __future__ import annotations

import numpy as np
import pytest
from report_cells import value_of

from splitray.catalog import architecture
from splitray.errors import InputError
from splitray.evaluate import replacement as suite
from splitray.evaluate.options import Options
from splitray.evaluate.stream import Copying, Stream, StreamPrices, TracedLink
from splitray.evaluate.suites import run
from splitray.planners import make_planner
from splitray.sim.traces import Trace
from splitray.topology import Topology


@pytest.fixture(scope="module")
def prices() -> StreamPrices:
    return StreamPrices(architecture(suite.MODEL), Topology.pair(suite.EDGE, link=suite.LINK, origin_holds=suite.HOLDS))


def stream(prices: StreamPrices, trace: Trace) -> Stream:
    return Stream(prices, TracedLink(trace, 2000.0), prompt_tokens=16, output_tokens=48)


def test_the_wire_carries_what_the_trace_says_and_waits_in_outages():
    wire = TracedLink(Trace(np.array([0.0, 10.0, 20.0]), np.array([100.0, 0.0, 50.0])), 60.0)
    assert wire.sent(5.0) == 500.0 and wire.sent(15.0) == 1000.0 == wire.sent(20.0)
    assert wire.until(0.0, 500.0) == 5.0
    assert wire.until(5.0, 600.0) == pytest.approx(22.0), "500 before the outage, 100 behind it"
    assert wire.until(12.0, 0.0) == 12.0
    assert wire.rate(0.0, 20.0) == 50.0


def test_steps_follow_the_cost_model_at_any_rate(prices):
    from splitray.cost import CostModel
    from splitray.evaluate.stream import at_rate
    from splitray.planners.protocol import ClusterState

    for rate in (3e4, 3e5):
        topology = at_rate(prices.topology, rate)
        placement = make_planner("layer_dp").propose(
            ClusterState(arch=prices.arch, topology=at_rate(prices.topology, 1e9), context_tokens=64)
        )
        step = prices.token(placement, 64)
        wanted = CostModel(prices.arch, topology).tpot_s(placement, context_tokens=64)
        assert step.own_s + step.link_bytes / rate == pytest.approx(wanted, rel=1e-6)
        assert step.link_bytes > 0


def test_copies_take_half_of_a_link_that_is_used(prices):
    trace = Trace(np.array([0.0, 1000.0]), np.array([1e5, 1e5]))
    s = stream(prices, trace)
    edge, cloud = sorted(suite.candidates_of(prices, Trace(np.array([0.0, 1.0, 2.0]), np.array([1e3, 1e5, 1e7]))),
                         key=lambda p: prices.token(p, 64).link_bytes)  # fmt: skip
    copying = Copying(edge, 1e9)
    alone, beside = s.advance(cloud, 1, 10, 0.0)[0], s.advance(cloud, 1, 10, 0.0, copying)[0]
    sent = prices.token(cloud, 64).link_bytes * 10
    assert beside - alone == pytest.approx(sent / 1e5, rel=0.01)
    assert 1e9 - copying.left_bytes == pytest.approx(beside * 1e5 / 2)


@pytest.mark.full
def test_nobody_beats_the_clairvoyant_and_a_steady_link_is_left_alone(prices):
    flipping = suite.flips(prices)["10x up and down, every 60 s"]
    s, requests = stream(prices, flipping), 40
    candidates = suite.candidates_of(prices, flipping)
    assert len(candidates) == 2
    best = min(suite.fixed(s, c, requests) for c in candidates)
    online = suite.Online(s, make_planner(suite.PLANNER))
    ours, bound = online.run(requests), suite.clairvoyant(s, candidates, requests)
    assert bound <= ours < best / 1.1 and online.moves >= 2
    steady = stream(prices, Trace(np.array([0.0, 1000.0]), np.array([1e6, 1e6])))
    online = suite.Online(steady, make_planner(suite.PLANNER))
    assert online.run(3) == pytest.approx(min(suite.fixed(steady, c, 3) for c in candidates)) and online.moves == 0


@pytest.mark.full
def test_the_report_says_how_much_there_was_to_gain(prices, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LEAST_S", 20.0)
    rng = np.random.default_rng(0)
    files = []
    for n in range(2):
        rates = np.exp(rng.normal(0, 1.2, 60).repeat(5)) * 0.8
        files.append(tmp_path / f"trace{n}")
        files[-1].write_text("".join(f"{t} {r:.4f}\n" for t, r in enumerate(rates)))
    report = run("replacement", Options(traces=tuple(map(str, files))))
    (targets, recorded, constructed) = report.tables
    assert [r[0] for r in recorded.rows] == ["trace0", "trace1"] and len(constructed.rows) == 3
    for row in (*recorded.rows, *constructed.rows):
        best, worst, ours, bound = (value_of(row[i]) for i in (2, 3, 4, 5))
        assert bound <= min(best, ours) * 1.0001 and best <= worst
    assert "origin holds embedding and head" in report.markdown()


def test_traces_that_do_not_vary_are_refused(tmp_path):
    flat = tmp_path / "flat"
    flat.write_text("0 5\n1 5\n2 5\n")
    with pytest.raises(InputError, match="vary more than 4x"):
        run("replacement", Options(traces=(str(flat),)))
