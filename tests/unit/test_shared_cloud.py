"""The suite of the learned policy: cells, intervals, paired tests, and a report that hides no cell."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from report_cells import value_of

from splitray.evaluate import foresight, shared_cloud, splitwise, trade
from splitray.evaluate.options import Options
from splitray.evaluate.shared_cloud import MOST_USERS, Paired, mean_and_interval, scenarios_of
from splitray.planners.protocol import RequestShape
from splitray.rl.world.cell import Cell, references
from splitray.rl.world.weather import users_of
from splitray.topology import DeviceId

CELL = Cell(edge="jetson-orin-nx-16gb", model="gpt2-xl", holds="embedding_and_head")


def test_a_mean_has_its_t_interval() -> None:
    mean, half = mean_and_interval(np.array([1.0, 2.0, 3.0, np.nan]))
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert np.isnan(mean_and_interval(np.array([np.nan]))[0])


def test_a_paired_test_sees_a_steady_difference_and_no_other() -> None:
    rng = np.random.default_rng(1)
    other = rng.lognormal(0, 1, 8)
    assert Paired(other * rng.normal(0.9, 0.01, 8), other).p_lower < 0.01
    assert Paired(other, other).p_lower == 1.0
    assert Paired(rng.permutation(other), other).p_lower > 0.05
    assert Paired(other * 0.8, other).ratio == pytest.approx(0.8)


def test_seeds_make_weather_and_edges_have_links_and_requests_of_their_own() -> None:
    options = Options(slots=300)
    light, heavy, again, other = (
        scenarios_of(CELL, load, options, seed) for load, seed in ((0.5, 1), (0.95, 1), (0.95, 1), (0.95, 2))
    )
    assert len(heavy) == min(MOST_USERS, users_of(references(CELL.arch, CELL.topology)))
    asked = [sum(len(s.requests) for s in world) for world in (light, heavy)]
    assert asked[1] / asked[0] == pytest.approx(0.95 / 0.5, rel=0.15)
    pair = (DeviceId("edge"), DeviceId("cloud"))
    assert np.array_equal(heavy[0].bandwidth_bytes_per_s[pair], again[0].bandwidth_bytes_per_s[pair])
    assert not np.array_equal(heavy[0].bandwidth_bytes_per_s[pair], heavy[1].bandwidth_bytes_per_s[pair])
    assert not np.array_equal(heavy[0].bandwidth_bytes_per_s[pair], other[0].bandwidth_bytes_per_s[pair])


def test_recorded_requests_are_dealt_at_the_rate_that_loads_the_cloud(tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(3), ["arrival_s,prompt_tokens,output_tokens"]
    lines += [f"{t},{rng.integers(20, 300)},{rng.integers(1, 90)}" for t in np.cumsum(rng.exponential(0.1, 900))]
    path = tmp_path / "requests.csv"
    path.write_text("\n".join(lines) + "\n")
    options = Options(slots=400, arrivals=str(path), traces=("log_ar1:0.3",))
    cell = Cell(edge="galaxy-s23", model="llama-7b")
    for load in (0.5, 0.95):
        world = scenarios_of(cell, load, options, 0)
        shape = world[0].shape
        assert shape is not None and shape == world[1].shape, "edges of one service know one mean request"
        known = references(cell.arch, cell.topology, shape)
        demand = [known.cloud.device_s(RequestShape(p, o)) for s in world
                  for p, o in zip(s.requests.prompt_tokens, s.requests.output_tokens, strict=True)]  # fmt: skip
        assert sum(demand) / 400 == pytest.approx(load, rel=0.15)


@pytest.mark.full
def test_the_report_has_every_cell_and_names_every_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(shared_cloud.load_cells, edges=("jetson-orin-nx-16gb",), models=("gpt2-xl",), loads=(0.95,), seeds=2)
    monkeypatch.setattr(splitwise, "load_cells", few)
    monkeypatch.setattr(foresight, "CELLS", (CELL,))
    monkeypatch.setattr(foresight, "LOADS", (0.95,))
    monkeypatch.setattr(foresight, "_SLOTS", 8)
    monkeypatch.setattr(trade, "SLOTS", 200)
    planners = ("cloud_only", "cloud_only_rtt", "static_cut", "layer_dp", "layer_cut", "splitwise", "alone")
    assert set(planners) < set(splitwise.PLANNERS), "the others take long"
    report = splitwise.run(Options(slots=20), lambda _: None, planners=planners)
    targets, latency, tail, energy, ahead, of_v = report.tables
    assert len(ahead.rows) == 2 and value_of(ahead.rows[0][-1]) > 0.5
    assert len(latency.rows) == len(tail.rows) == len(energy.rows) == 2
    assert latency.columns[1:] == planners
    assert any("static_cut" in str(row[0]) for row in targets.rows)
    assert value_of(of_v.rows[0][1]) > value_of(of_v.rows[-1][1])
    assert {"ratios", "v"} <= set(report.plots)
