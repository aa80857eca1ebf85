"""`splitray simulate` and `splitray evaluate`: documents, files, plots, provenance, and what is refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from splitray.commands.cli import app
from splitray.evaluate import clusters, traces, trade
from splitray.evaluate.options import Options
from splitray.evaluate.suites import run as evaluate
from splitray.report.document import Number, Report, Table
from splitray.report.plots import front_plot, latency_plot, ratio_plot, trade_plot
from splitray.report.simulation import simulation_rows, simulation_table

TOPOLOGY = """
origin_holds: embedding_and_head
devices:
  - {id: nano, tier: edge, catalog: jetson-orin-nx-16gb}
  - {id: gpu, tier: cloud, catalog: a100-80gb}
links: [{between: [nano, gpu], catalog: wifi6}]
"""
PLANNERS = "cloud_only,layer_cut,drift_plus_penalty"
SPREAD = {"mean", "p50", "p95", "p99"}


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(TOPOLOGY)
    return path


def simulate(topology: Path, *arguments: str, model: str = "gpt2-xl", planners: str = PLANNERS) -> Result:
    return CliRunner().invoke(
        app, ["simulate", "--model", model, "--topology", str(topology), "--planners", planners, *arguments]
    )


def test_the_document_has_every_figure_of_every_planner(topology: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(f"{t} {0.5 if t // 10 % 2 else 300}\n" for t in range(60)))
    out = tmp_path / "out"
    result = simulate(topology, "--json", "--slots", "60", "--bandwidth-trace", str(trace), "--out", str(out))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document["planners"]) == set(PLANNERS.split(","))
    for found in document["planners"].values():
        assert set(found["latency_s"]) == set(found["ttft_s"]) == set(found["tpot_s"]) == SPREAD
        assert {"mean", "max", "slope_p"} == set(found["backlog"])
        assert found["requests"]["finished"] > 0
        assert found["energy_j_per_request"] > found["edge_energy_j_per_request"] > 0
        assert found["accuracy_loss"] == 0
    assert "simulated" in document["provenance"]["planners"]
    assert document["planners"]["drift_plus_penalty"]["migrations"] > 0
    assert json.loads((out / "simulation.json").read_text()) == document
    names = {p.name for p in out.glob("*.png")}
    assert names >= {"latency.png", "backlog.png", "energy.png", "front.png", "placement-drift_plus_penalty.png"}
    samples = np.load(out / "samples.npz")
    latency = samples["cloud_only/finish_s"] - samples["cloud_only/arrival_s"]
    assert np.nanmean(latency) == pytest.approx(document["planners"]["cloud_only"]["latency_s"]["mean"])


def test_the_same_seed_gives_the_same_document_and_another_another(topology: Path) -> None:
    def document(seed: str) -> str:
        found = json.loads(simulate(topology, "--json", "--slots", "40", "--seed", seed, "--bandwidth-trace",
                                    "log_ar1:0.5+gilbert_elliott", "--rtt-trace", "log_ar1:0.2").stdout)  # fmt: skip
        for planner in found["planners"].values():
            planner.pop("decision_s")
        return json.dumps(found)

    assert document("1") == document("1")
    assert document("1") != document("2")


def test_a_noisy_channel_shows_what_the_surrogate_tells(topology: Path) -> None:
    planners = "fixed_cut:12"
    weak, strong = (
        json.loads(simulate(topology, "--json", "--slots", "30", "--channel", c, planners=planners).stdout)
        for c in ("loss:0.05", "loss:0.3")
    )
    losses = [d["planners"][planners]["accuracy_loss"] for d in (weak, strong)]
    assert 0 < losses[0] < losses[1] and "surrogate" in weak["provenance"]["accuracy_loss"]
    shown = simulate(topology, "--slots", "30", "--channel", "loss:0.3", planners=f"{planners},cloud_only").stdout
    assert "+ppl" in shown and f"{100 * losses[1]:.0f} %" in shown and max(map(len, shown.splitlines())) <= 80
    assert "+ppl" not in simulate(topology, "--slots", "30", planners=planners).stdout


def test_a_lossy_codec_shows_its_measured_loss(topology: Path) -> None:
    planners = "layer_cut,fixed_cut:12,cloud_only"
    found = json.loads(simulate(topology, "--json", "--slots", "30", "--codec", "int4", planners=planners).stdout)
    assert found["planners"]["fixed_cut:12"]["accuracy_loss"] > 0
    assert "measured" in found["provenance"]["accuracy_loss"]


def test_a_person_sees_a_table_in_eighty_columns(topology: Path) -> None:
    result = simulate(topology, "--slots", "20")
    assert result.exit_code == 0, result.output
    for word in (*PLANNERS.split(","), "latency", "p95", "energy", "simulated"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bandwidth-trace", "absent.txt"], "readable file"),
        (["--bandwidth-trace", "log_ar1:x"], "number above 0"),
        (["--rtt-trace", "gilbert_elliott"], "for a bandwidth"),
        (["--arrivals", "absent.csv"], "readable file"),
        (["--arrivals", "poisson:-1"], "number above 0"),
        (["--lose", "moon:1:2"], "DEVICE:FROM_S:TO_S"),
        (["--lose", "gpu:5:2"], "DEVICE:FROM_S:TO_S"),
        (["--lose", "nano:1:2"], "other than the origin"),
        (["--background", "2"], "a share from 0 to 1"),
        (["--slots", "0"], "--slots"),
        (["--slot-s", "0"], "longer than 0 s"),
        (["--slot-s", "-1"], "longer than 0 s"),
        (["--slot-s", "nan"], "longer than 0 s"),
        (["--slot-s", "inf"], "a finite slot"),
        (["--slot-s", "0", "--lose", "gpu:1:2"], "longer than 0 s"),
        (["--lose", "gpu:0:inf"], "finite times"),
        (["--edges", "0"], "from 1 to 64 edges"),
        (["--edges", "-3", "--shared-cloud"], "from 1 to 64 edges"),
        (["--edges", "65", "--shared-cloud"], "from 1 to 64 edges"),
        (["--edges", "two"], "--edges"),
        (["--shared-cloud"], "--edges N"),
        (["--planners", "cloud_only,cloud_onyl"], "cloud_only"),
        (["--planners", "cloud_only,cloud_only"], "distinct names"),
    ],
)
def test_bad_input_ends_with_two_and_says_what_to_do(topology: Path, arguments: list[str], complaint: str) -> None:
    result = simulate(topology, *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert "What to do" in result.stderr or "--help" in result.stderr


def test_edges_that_share_a_cloud_slow_each_other_down_and_a_sum_is_told_of_them(
    topology: Path, tmp_path: Path
) -> None:
    lines = "".join(f"{0.3 * i},64,32\n" for i in range(80))
    (tmp_path / "asked.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{lines}")
    given = ("--json", "--slots", "30", "--arrivals", str(tmp_path / "asked.csv"))
    trace = ("--bandwidth-trace", "log_ar1:0.5")
    one, shared, apart = (
        json.loads(simulate(topology, *given, *trace, *more, planners="cloud_only,static_cut").stdout)
        for more in ((), ("--edges", "4", "--shared-cloud"), ("--edges", "4"))
    )
    assert (one["edges"], one["shared_cloud"], shared["edges"], shared["shared_cloud"]) == (1, False, 4, True)
    for name, found in shared["planners"].items():
        assert found.keys() == one["planners"][name].keys()
        assert found["requests"]["arrived"] == one["planners"][name]["requests"]["arrived"] == 80
        other = apart["planners"][name]
        assert found["latency_s"]["mean"] > other["latency_s"]["mean"], "who is alone on a cloud is quicker"
        assert found["energy_j_per_request"] == pytest.approx(other["energy_j_per_request"], rel=0.5)
    again = json.loads(simulate(topology, *given, *trace, "--edges", "1", planners="cloud_only,static_cut").stdout)
    for each in (one, again):
        each["planners"]["cloud_only"].pop("decision_s")
    assert again["planners"]["cloud_only"] == one["planners"]["cloud_only"], "one edge is what it was"


def test_a_crowd_needs_the_tiers_that_make_it(tmp_path: Path) -> None:
    path = tmp_path / "edges.yaml"
    path.write_text("devices:\n- {id: pi, tier: edge, catalog: raspberry-pi-5}\n")
    found = simulate(path, "--edges", "2", "--shared-cloud", planners="edge_only")
    assert found.exit_code == 2 and "a device of tier cloud" in found.stderr
    path.write_text("devices:\n- {id: gpu, tier: cloud, catalog: a100-80gb}\n")
    found = simulate(path, "--edges", "2", planners="cloud_only")
    assert found.exit_code == 2 and "a device of tier edge" in found.stderr


def test_an_infeasible_model_names_the_constraint_and_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("devices:\n- {id: pi, tier: edge, catalog: raspberry-pi-5}\n")
    result = simulate(path, model="llama-13b", planners="edge_only,greedy")
    assert result.exit_code == 2
    assert "memory" in result.stderr
    assert "bytes" in result.stderr


@pytest.mark.parametrize("planners", ["exact", PLANNERS])
def test_a_device_that_nothing_reaches_is_named(tmp_path: Path, planners: str) -> None:
    path = tmp_path / "island.yaml"
    path.write_text(
        "devices:\n- {id: nano, tier: edge, catalog: jetson-orin-nx-16gb}\n"
        "- {id: gpu, tier: cloud, catalog: a100-80gb}\n"
    )
    result = simulate(path, planners=planners)
    assert result.exit_code == 2
    assert "no links that join it with gpu" in " ".join(result.stderr.split())


def test_an_unknown_model_names_the_known_ones(topology: Path) -> None:
    result = simulate(topology, model="gpt5")
    assert result.exit_code == 2
    assert "gpt2-xl" in result.stderr


def test_a_run_that_finishes_no_request_still_draws_its_plots(topology: Path, tmp_path: Path) -> None:
    arrivals = tmp_path / "arrivals.csv"
    arrivals.write_text("arrival_s,prompt_tokens,output_tokens\n1000,10,3\n")
    result = simulate(topology, "--slots", "5", "--arrivals", str(arrivals), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert names >= {"latency.png", "front.png", "energy.png", "placement-drift_plus_penalty.png"}


def test_figures_without_a_value_are_dashes_and_a_long_name_cuts_no_number() -> None:
    spread = {"mean": 1.0, "p95": None}
    found = {"latency_s": spread, "tpot_s": spread, "energy_j_per_request": None, "migrations": 3,
             "decision_s": 0.0123, "accuracy_loss": 0.0, "requests": {"finished": 1, "arrived": 22222}}  # fmt: skip
    name = "policy:" + "a-long-folder/" * 9
    document = {"planners": {name: found}}
    assert simulation_rows(document) == [(name, "1.00 s", "-", "1.00 s", "-", "3", "12.3 ms", "1/22222")]
    console = Console(width=80, record=True, file=StringIO())
    console.print(simulation_table(document))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert all(cell in text for cell in ("1.00 s", "12.3 ms", "1/22222"))
    assert "…" not in text


def test_a_long_range_is_logarithmic_and_a_short_or_empty_one_linear() -> None:
    for samples, scale in (([], "linear"), ([0.0, 50.0], "linear"), ([1.0, 3.0], "linear"), ([0.1, 50.0], "log")):
        axes = latency_plot({"a": samples}).axes[0]
        assert axes.get_xscale() == scale
        assert [np.asarray(line.get_ydata())[:1].tolist() for line in axes.lines] == [[0.0]] * bool(samples)
    assert front_plot({}, {}).axes[0].get_yscale() == "linear"
    assert front_plot({"a": 1.0, "b": 30.0}, {"a": 2.0, "b": 1.0}).axes[0].get_xscale() == "log"
    assert trade_plot([1, 10], [1, 2], [1, 100]).axes[1].get_yscale() == "linear"
    ratios = ratio_plot("t", ["a"], ["x", "y"], [[1.0, float("nan")]]).axes[0]
    assert [t.get_text() for t in ratios.texts] == ["1.00"]
    assert [p.get_hatch() for p in ratios.patches] == ["////"]


def test_a_report_refuses_a_number_without_provenance() -> None:
    with pytest.raises(ValueError, match="Number with its provenance"):
        Table("t", ("a",), ((1.0,),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table("t", ("a", "b"), (("x",),))


def test_a_report_shows_where_each_number_comes_from(tmp_path: Path) -> None:
    table = Table(
        "Times", ("what", "value"), (("a|b", Number(0.5, "s", "measured")), ("c", Number(None, "s", "paper")))
    )
    report = Report("Test", {"seed": 1}, (table,))
    assert "| a/b | 500 ms M |" in report.markdown()
    assert "500 ms <sup>M</sup>" in report.html()
    report.save(tmp_path / "r")
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["tables"][0]["rows"][0][1] == {"value": 0.5, "unit": "s", "provenance": "measured"}


def test_an_unknown_suite_is_refused() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--suite", "planers"])
    assert result.exit_code == 2
    assert "did you mean planners" in " ".join(result.stderr.split())


@pytest.mark.full
@pytest.mark.slow
def test_the_planners_suite_shows_who_loses_to_cloud_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run on fewer models and instances, so that every table and plot is made."""
    monkeypatch.setattr(traces, "MODELS", ("gpt2-xl",))
    monkeypatch.setattr(traces, "EDGES", ("jetson-orin-nx-16gb", "raspberry-pi-5"))
    monkeypatch.setattr(clusters, "INSTANCES", 3)
    monkeypatch.setattr(clusters, "CLUSTERS", 1)
    monkeypatch.setattr(trade, "SLOTS", 100)
    monkeypatch.setattr(clusters, "PLANNERS", ("layer_dp", "myopic", "exact"))
    report = evaluate("planners", Options(slots=60, traces=("log_ar1:0.8",), arrivals="poisson:0.1"))
    titles = [t.title for t in report.tables]
    assert len(titles) == len(set(titles)) >= 9
    summary = report.tables[0]
    assert [r[0] for r in summary.rows][:2] == ["cloud_only", "cloud_only_rtt"]
    against = next(t for t in report.tables if t.title.startswith("drift_plus_penalty"))
    layer_dp = next(r for r in against.rows if r[0] == "layer_dp")
    assert isinstance(layer_dp[1], Number)
    assert layer_dp[1].value is not None
    assert layer_dp[1].value <= 0.2
    written = report.save(tmp_path)
    assert {"report.json", "report.md", "report.html", "ratios.png", "trade.png"} <= {p.name for p in written}
