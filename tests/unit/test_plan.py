"""`splitray plan`: the document, the picture, the placement file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from splitray.catalog import architecture
from splitray.commands.cli import app
from splitray.cost import CostModel
from splitray.errors import PlacementError, TopologyError
from splitray.placement import Placement
from splitray.planners import PLANNER_USAGES, ClusterState, make_planner
from splitray.planners.memory import check
from splitray.planners.priced import priced
from splitray.topology import Topology

TOPOLOGY = """
devices:
  - {id: nano, tier: edge, catalog: jetson-orin-nx-16gb}
  - {id: gpu, tier: cloud, catalog: a100-80gb}
links: [{between: [nano, gpu], catalog: lte}]
"""


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(TOPOLOGY)
    return path


def plan(topology: Path, *arguments: str, model: str = "llama-7b", planner: str = "layer_cut") -> Result:
    return CliRunner().invoke(
        app, ["plan", "--model", model, "--topology", str(topology), "--planner", planner, *arguments]
    )


def test_the_document_prices_the_placement_that_it_shows(topology: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.yaml"
    result = plan(topology, "--json", "--context", "1000", "--out", str(out))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    arch, where = architecture("llama-7b"), Topology.load(topology)
    placement = Placement.from_document(document["placement"])
    assert placement == Placement.load(out)
    check(placement, ClusterState(arch=arch, topology=where, context_tokens=1000))
    cost = CostModel(arch, where)
    assert document["predicted"]["tpot_s"] == pytest.approx(cost.tpot_s(placement, context_tokens=1000))
    assert document["predicted"]["ttft_s"] == pytest.approx(cost.ttft_s(placement, prompt_tokens=1000))
    assert document["predicted"]["memory_bytes"]["gpu"] > 13e9
    assert document["exchanges_per_token"] <= 2  # over LTE all goes to the cloud, and tokens stream back


def test_a_person_sees_the_picture_and_predicted_figures(topology: Path) -> None:
    result = plan(topology, planner="proportional")
    assert result.exit_code == 0, result.output
    for text in ("layer 31", "predicted time per later token", "nano", "of its memory"):
        assert text in result.stdout


def test_the_shipped_model_can_be_planned(topology: Path) -> None:
    document = json.loads(plan(topology, "--json", model="tiny", planner="tensor_parallel").stdout)
    assert len(document["placement"]["layers"]) >= 12


@pytest.mark.full
def test_codec_channel_and_crossings_are_traded_against_perplexity(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    free = "catalog: raspberry-pi-5, idle_w: 0, active_w: 0"
    path.write_text(f"""
devices: [{{id: a, tier: edge, {free}}}, {{id: b, tier: cloud, {free}}}]
links: [{{between: [a, b], catalog: gigabit-lan}}]
""")

    def planned(weight: int | None, *options: str) -> tuple[float, float, int]:
        planner = "best_device" if weight is None else f"drift_plus_penalty:{weight}"
        found = json.loads(plan(path, "--json", *options, model="gpt2-xl", planner=planner).stdout)
        return found["predicted"]["tpot_s"], found["accuracy_loss"], found["exchanges_per_token"]

    exact, noisy, careful = planned(0), planned(0, "--channel", "loss:0.1"), planned(1, "--channel", "loss:0.1")
    assert exact[1] == 0 and noisy[::2] == exact[::2], "at no weight only time counts"
    assert careful[0] > noisy[0] and careful[1] < noisy[1] and careful[2] < noisy[2]
    coded, both = planned(0, "--codec", "int4"), planned(0, "--codec", "int4", "--channel", "loss:0.1")
    assert coded[0] < exact[0] and 0 < coded[1] < both[1]
    alone, weighed = planned(None, "--channel", "loss:0.02"), planned(10, "--channel", "loss:0.02")
    assert alone[1] == 0, "nothing crosses"
    assert weighed[0] + 10 * weighed[1] <= alone[0], "by the surrogate's own word never worse than one device"
    assert plan(path, "--channel", "loss:1").exit_code == 2
    assert "rise of perplexity" in plan(path, "--channel", "loss:0.1", model="tiny", planner="even").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "lama-7b"}, "did you mean llama-7b?"),
        ({"model": "gpt5"}, "gpt2-xl"),
        ({"planner": "layer_cot"}, "did you mean layer_cut?"),
        ({"model": "llama-13b", "planner": "edge_only"}, "bytes on nano"),
    ],
)
def test_what_cannot_be_is_refused_with_code_2(topology: Path, arguments: dict[str, str], text: str) -> None:
    result = plan(topology, **arguments)
    assert result.exit_code == 2
    assert text in result.stderr


PLAN_KEYS = {
    "planner", "placement", "predicted", "exchanges_per_token", "optimal_tpot_s", "gap", "global_optimal_tpot_s",
    "global_gap", "lower_bound", "proven", "decision_s",
}  # fmt: skip


@pytest.mark.parametrize("usage", PLANNER_USAGES)
def test_every_planner_is_set_against_the_optimum_of_its_own_space_and_of_ours(topology: Path, usage: str) -> None:
    name = usage.partition("[")[0].replace(":P", ":16")
    document = json.loads(plan(topology, "--json", "--context", "300", planner=name).stdout)
    assert set(document) >= PLAN_KEYS
    assert set(document["predicted"]) == {"ttft_s", "tpot_s", "energy_j_per_token", "memory_bytes"}
    tpot_s = document["predicted"]["tpot_s"]
    assert -1e-9 <= document["gap"] <= document["global_gap"] + 1e-9
    assert document["gap"] == pytest.approx(tpot_s / document["optimal_tpot_s"] - 1)
    assert document["global_gap"] == pytest.approx(tpot_s / document["global_optimal_tpot_s"] - 1)
    assert document["lower_bound"] <= document["global_optimal_tpot_s"] <= document["optimal_tpot_s"] * (1 + 1e-9)
    assert document["proven"] == (document["global_optimal_tpot_s"] <= document["lower_bound"] * (1 + 1e-6))
    if name in ("exact", "drift_plus_penalty"):
        assert document["global_gap"] <= 1e-6
    if name in ("cloud_only", "best_device"):
        assert document["gap"] == pytest.approx(0)


def write(path: Path, *memory_bytes: float, linked: bool = True) -> str:
    """A topology file of edges with so much memory, all linked or none."""
    devices = [
        f"{{id: d{i}, tier: edge, catalog: raspberry-pi-5, memory_bytes: {m}}}" for i, m in enumerate(memory_bytes)
    ]
    pairs = [(i, j) for j in range(len(devices)) for i in range(j)] if linked else []
    links = [f"{{between: [d{i}, d{j}], catalog: gigabit-lan}}" for i, j in pairs]
    path.write_text(f"devices: [{', '.join(devices)}]\nlinks: [{', '.join(links)}]\n")
    return str(path)


@pytest.mark.parametrize("planner", ["exact", "drift_plus_penalty"])
@pytest.mark.parametrize(
    ("memory_bytes", "text"), [((4e9, 4e9), "5,744,734,208 bytes too many"), ((1e9,), "bytes too many")]
)
def test_what_fits_nowhere_is_refused_with_the_constraint_and_by_how_much(
    tmp_path: Path, planner: str, memory_bytes: tuple[float, ...], text: str
) -> None:
    where = write(tmp_path / "where.yaml", *memory_bytes)
    with pytest.raises(PlacementError) as refused:
        priced(architecture("llama-7b"), Topology.load(where), planner, context_tokens=512)
    assert "memory: expected room for llama-7b with 512 tokens" in str(refused.value)
    assert text in str(refused.value)
    result = plan(Path(where), "--context", "512", planner=planner)
    assert result.exit_code == 2


@pytest.mark.parametrize("planner", ["exact", "even"])
def test_devices_that_nothing_reaches_are_refused_by_name(tmp_path: Path, planner: str) -> None:
    where = write(tmp_path / "where.yaml", 2e10, 2e10, linked=False)
    with pytest.raises(TopologyError, match="the origin d0.*d1"):
        priced(architecture("llama-7b"), Topology.load(where), planner, context_tokens=512)
    result = plan(Path(where), planner=planner)
    assert result.exit_code == 2
    assert "d1" in result.stderr


def test_the_exact_search_leaves_an_island_alone_or_says_that_it_cannot_share(tmp_path: Path) -> None:
    arch = architecture("llama-7b")

    def propose(memory_bytes: float) -> Placement:
        where = write(tmp_path / "where.yaml", memory_bytes, memory_bytes, linked=False)
        state = ClusterState(arch=arch, topology=Topology.load(where), context_tokens=512)
        return make_planner("exact").propose(state)

    assert {str(d) for d in propose(2e10).devices} == {"d0"}
    with pytest.raises(PlacementError, match=r"without a link cannot share \(d0 and d1\)"):
        propose(8e9)


def test_a_codec_is_chosen_by_what_perplexity_weighs(tmp_path: Path) -> None:
    """Neither device has room for the model, so that something has to cross; int8 costs next to nothing in quality."""
    where = write(tmp_path / "where.yaml", 8e9, 8e9)
    cheap, dear = (
        priced(
            architecture("llama-7b"), Topology.load(where), f"drift_plus_penalty:{v}", context_tokens=512, codec="auto"
        )
        for v in ("1e-9", "10")
    )
    assert (cheap.codec, dear.codec) == ("int4", "int8")
    assert cheap.accuracy_loss > dear.accuracy_loss and cheap.predicted.tpot_s < dear.predicted.tpot_s


@pytest.mark.parametrize("planner", ["even", "drift_plus_penalty"])
def test_a_planner_without_a_price_of_perplexity_chooses_no_codec(tmp_path: Path, planner: str) -> None:
    result = plan(Path(write(tmp_path / "where.yaml", 2e10)), "--codec", "auto", planner=planner)
    assert result.exit_code == 2
    assert "codec auto: expected the planner drift_plus_penalty:V" in result.stderr
