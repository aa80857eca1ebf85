"""What formats of weights cost in quality: the shipped table, what planners read in it, and the choice of formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from splitray.arch import held_as, held_by
from splitray.catalog import architecture
from splitray.commands.cli import app
from splitray.errors import InputError, PlacementError
from splitray.placement import Placement, Shares
from splitray.planners import make_planner
from splitray.planners.best_weights import best_weights
from splitray.planners.memory import needed_bytes
from splitray.planners.protocol import ClusterState
from splitray.profiling.weight_loss import main, measure, parts_of, placed
from splitray.quality.weight_loss import WeightLossTable, shipped_weight_loss, weights_loss
from splitray.runtime.launch import launch_engine
from splitray.runtime.model_arch import read_model_arch
from splitray.topology import DeviceId, Topology
from splitray.weight_formats import FORMATS, StoredWeights

TEXT = "Licensed under the Apache License, Version 2.0. You may not use this file except in compliance with it. " * 6
HELD = [name for name, kind in FORMATS.items() if kind.is_held]


def test_the_shipped_model_keeps_its_quality() -> None:
    table = shipped_weight_loss()
    assert {(r.weights, r.part) for r in table.rows} == {(w, p) for w in HELD for p in parts_of(table.num_layers)}
    assert table.rise("bfloat16", "all") < 1e-4 and table.rise("int8", "all") < 0.005
    assert table.rise("int4", "all") < 0.04 and table.rise("int4/128", "all") < 0.04
    with pytest.raises(InputError, match="quality of int8 for layers:0-1"):
        table.rise("int8", "layers:0-1")


def test_a_placement_costs_what_its_formats_cost() -> None:
    table = shipped_weight_loss()
    plain = architecture("llama-7b", dtype="float32")
    whole = placed("all", plain)
    assert weights_loss(whole, plain) == 0.0
    for name in HELD:
        assert weights_loss(whole, held_as(plain, name)) == pytest.approx(table.rise(name, "all"), abs=1e-12)
    arch = held_by(plain, {"edge0": "int4", "cloud0": "int8"})
    costs = [weights_loss(placed(part, arch), arch) for part in ("all", "attention", "ffn", "none")]
    assert costs[0] > costs[1] > costs[2] > costs[3] == pytest.approx(table.rise("int8", "all"))
    late, early = (weights_loss(placed(p, arch), arch) for p in ("layers:16-24", "layers:24-32"))
    assert late > early, "as the third quarter of the measured model"


def test_numbers_that_are_held_as_they_are_stored_are_not_charged_for_being_rounded() -> None:
    plain, topology = architecture("llama-7b", dtype="float32"), Topology.uniform(2)
    found = {}
    for stored in (None, StoredWeights("int4", 7.2)):
        for weights in ("int8", "int4"):
            arch = held_as(replace(plain, stored=stored), weights)
            placement = make_planner("even").propose(ClusterState(arch=arch, topology=topology))
            found[weights, stored is not None] = weights_loss(placement, arch)
    assert found["int4", True] == found["int8", True] == found["int8", False] < found["int4", False]


def test_a_table_is_measured_and_read_back(tmp_path) -> None:
    table = measure("tiny", TEXT, about="a licence", formats=["int8"], most_tokens=40, window=20, stride=10)
    assert {r.part for r in table.rows} == {"all", "layers:0-3", "layers:3-6", "layers:6-9", "layers:9-12", "attention",
                                           "ffn", "tables"}  # fmt: skip
    assert all(0.9 < r.perplexity / table.perplexity < 1.1 and r.perplexity != table.perplexity for r in table.rows)
    table.save(tmp_path / "t.json")
    assert WeightLossTable.load(tmp_path / "t.json") == table
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text().replace('"int8"', '"int5"'))
    with pytest.raises(InputError, match="int5"):
        WeightLossTable.load(tmp_path / "t.json")


def test_a_wrong_format_is_refused_before_anything_is_measured(tmp_path, capsys) -> None:
    assert main(["--formats", "int9", "--out", str(tmp_path / "x.json")]) == 2
    assert "one of" in capsys.readouterr().err


def two(first: float, second: float) -> Topology:
    where = Topology.uniform(2)
    devices = tuple(replace(d, memory_bytes=m) for d, m in zip(where.devices, (first, second), strict=True))
    return replace(where, devices=devices)


@pytest.mark.thin(2)
@pytest.mark.parametrize("planner", ["drift_plus_penalty:10", "exact:10"])
@pytest.mark.parametrize(("gigabytes", "fits"), [((8.0, 4.0), {"int4", "int4/128"}), ((4.0, 2.5), {"int4/128"})])
def test_formats_are_chosen_that_fit(planner, gigabytes, fits) -> None:
    arch = replace(architecture("llama-7b", dtype="float32"), context_tokens=512)
    state = ClusterState(arch=arch, topology=two(*(g * 1e9 for g in gigabytes)), context_tokens=256)
    found = best_weights(make_planner(planner), state)
    chosen = found.tried[0]
    assert set(chosen.held.values()) <= fits and chosen.cost == min(t.cost for t in found.tried)
    needed = needed_bytes(found.placement, found.state)
    assert all(n <= found.state.topology.device(d).memory_bytes for d, n in needed.items())
    assert [d.weights for d in found.state.topology.devices] == list(chosen.weights.values())
    assert any(t.short and set(t.weights.values()) == {"float32"} for t in found.tried), "it says what does not fit"


def test_a_device_that_names_its_format_keeps_it() -> None:
    where = two(4e9, 8e9)
    where = replace(where, devices=(replace(where.devices[0], weights="int8"), where.devices[1]))
    arch = read_model_arch("llama-7b", weights="best", topology=where)
    found = best_weights(make_planner("drift_plus_penalty:10"), ClusterState(arch=arch, topology=where))
    assert all(t.weights["edge0"] == "int8" for t in found.tried)


def test_nothing_fits_in_any_format() -> None:
    state = ClusterState(arch=architecture("llama-7b", dtype="float32"), topology=two(1e9, 1e9))
    with pytest.raises(PlacementError, match="too many"):
        best_weights(make_planner("drift_plus_penalty:10"), state)


@pytest.mark.parametrize("planner", ["even", "drift_plus_penalty", "layer_cut", "random"])
def test_other_planners_refuse_to_choose(planner) -> None:
    state = ClusterState(arch=read_model_arch("tiny"), topology=Topology.uniform(2))
    with pytest.raises(InputError, match=f"weights best.*exact, or drift_plus_penalty:V.*got {planner}"):
        best_weights(make_planner(planner), state)


def test_a_run_takes_the_formats_that_its_planner_chooses() -> None:
    options: dict[str, Any] = {"model": "tiny", "devices": 2, "runtime": "local", "weights": "best"}
    with launch_engine(planner="drift_plus_penalty:1", **options) as engine:
        assert all(d.weights is not None for d in engine.topology.devices)
        held = {engine.arch.on(d).weights for d in engine.placement.devices}
        assert held <= set(FORMATS) and held != {"float32"}
    with pytest.raises(InputError, match="weights best.*got even"):
        launch_engine(**options)
    whole = Placement((), (DeviceId("edge0"),), Shares.whole(1, "edge0"))
    with pytest.raises(InputError, match="weights best: expected a planner.*a placement"):
        launch_engine(placement=whole, **options)


def plan(tmp_path: Path, *more: str, device: str = "") -> Result:
    file = tmp_path / "t.yaml"
    file.write_text(
        f"""devices:
  - {{id: edge, tier: edge, catalog: jetson-orin-nx-8gb{device}}}
  - {{id: cloud, tier: cloud, catalog: a100-80gb}}
links: [{{between: [edge, cloud], catalog: wifi5}}]
"""
    )
    return CliRunner().invoke(app, ["plan", "--model", "llama-13b", "--topology", str(file), "--limit-s", "1", *more])


def test_a_plan_says_why(tmp_path) -> None:
    asked = ("--planner", "drift_plus_penalty:10", "--weights", "best")
    found = json.loads(plan(tmp_path, *asked, "--json").stdout)
    assert found["weights_tried"][0]["cost"] == min(t["cost"] for t in found["weights_tried"] if t["cost"])
    assert set(found["weights"]) == {"edge", "cloud"} and found["accuracy_loss"] > 0
    text = plan(tmp_path, *asked).stdout
    assert "why these weights" in text and "cloud int8" in text


@pytest.mark.parametrize(
    ("more", "device", "what"),
    [
        (("--planner", "even", "--weights", "best"), "", "expected the planner exact, or drift_plus_penalty:V"),
        (("--planner", "even", "--weights", "int5"), "", "one of auto, float32"),
        (("--planner", "even"), ", weights: int5", "device edge: weights: expected one of auto"),
        (("--planner", "even"), ", weights: best", "device edge: weights: expected one of auto"),
        (("--planner", "drift_plus_penalty:1", "--weights", "best", "--codec", "auto"), "", "named codec"),
        (("--planner", "even", "--dtype", "bfloat16"), ", weights: int4", "--dtype float32"),
    ],
)
def test_bad_input_is_refused(more, device, what, tmp_path) -> None:
    result = plan(tmp_path, *more, device=device)
    assert result.exit_code == 2
    assert what in " ".join(result.stderr.split())
