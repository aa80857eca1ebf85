"""`splitray plan`: the document, the picture, the placement file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from splitray.catalog import architecture
from splitray.cli import app
from splitray.cost import CostModel
from splitray.placement import Placement
from splitray.planners import ClusterState
from splitray.planners.memory import check
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "lama-7b"}, "lama-7b"),
        ({"planner": "layer_cot"}, "did you mean layer_cut?"),
        ({"model": "llama-13b", "planner": "edge_only"}, "bytes on nano"),
    ],
)
def test_what_cannot_be_is_refused_with_code_2(topology: Path, arguments: dict[str, str], text: str) -> None:
    result = plan(topology, **arguments)
    assert result.exit_code == 2
    assert text in result.stderr
