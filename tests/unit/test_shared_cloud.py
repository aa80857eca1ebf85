"""The suite of the learned policy: cells, intervals, paired tests, and a report that hides no cell."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from splitray.evaluate import Options, shared_cloud, splitwise
from splitray.evaluate.shared_cloud import Paired, mean_and_interval, scenario_of
from splitray.rl.cell import Cell

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


def test_seeds_make_weather_and_load_makes_the_cloud_scarce() -> None:
    options = Options(slots=300)
    light, heavy, again = (scenario_of(CELL, load, options, 1) for load in (0.5, 0.95, 0.95))
    assert light.free_share[:, 1].mean() > heavy.free_share[:, 1].mean() + 0.2
    assert np.array_equal(heavy.free_share, again.free_share)
    assert heavy.memory_at(0)[1] == CELL.topology.devices[1].memory_bytes, "other users take speed, not our memory"
    assert not np.array_equal(heavy.free_share, scenario_of(CELL, 0.95, options, 2).free_share)


def test_the_report_has_every_cell_and_names_every_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(shared_cloud.load_cells, edges=(CELL.edge,), models=(CELL.model,), loads=(0.95,), seeds=2)
    monkeypatch.setattr(splitwise, "load_cells", few)
    report = splitwise.run(Options(slots=60), lambda _: None)
    targets, latency, energy = report.tables
    assert len(latency.rows) == len(energy.rows) == 2
    assert latency.columns[1:] == splitwise.PLANNERS
    assert any("static_cut" in str(row[0]) for row in targets.rows)
    assert "ratios" in report.plots
