"""Every file under clusters/ is read by what users read it with."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from splitray.arch import ModelArch
from splitray.placement import Placement, validate
from splitray.route import compile_route
from splitray.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
SHIPPED_CONFIG = ROOT / "splitray" / "model" / "shipped" / "config.json"
TOPOLOGIES = sorted(CLUSTERS.glob("topology-*.yaml"))
TINY = ModelArch(
    name="tiny",
    num_layers=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    hidden_dim=128,
    ffn_dim=384,
    vocab=2048,
    context_tokens=1024,
    tied_embeddings=True,
)


def onprem() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "onprem.yaml").read_text(encoding="utf-8"))


def test_each_file_is_of_a_kind_that_is_checked() -> None:
    names = {path.name for path in CLUSTERS.iterdir()} - {path.name for path in TOPOLOGIES}
    assert names == {"placement-example.yaml", "onprem.yaml", "README.md"}
    assert {path.name for path in TOPOLOGIES} >= {"topology-edge-cloud.yaml", "topology-three.yaml"}


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.stem)
def test_a_topology_file_loads_and_links_every_pair(path: Path) -> None:
    topology = Topology.load(path)
    assert topology.tier("edge") and topology.tier("cloud")
    for a in topology.ids:
        assert all(topology.link(a, b) for b in topology.ids if b != a)


def test_the_placement_example_is_valid_for_its_model_and_its_topology() -> None:
    placement = Placement.load(CLUSTERS / "placement-example.yaml")
    topology = Topology.load(CLUSTERS / "topology-edge-cloud.yaml")
    validate(placement, TINY, topology)
    compile_route(placement, TINY, topology)


def test_the_example_s_model_is_the_shipped_one() -> None:
    config = json.loads(SHIPPED_CONFIG.read_text(encoding="utf-8"))
    shipped = {
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "hidden_dim": config["hidden_size"],
        "ffn_dim": config["intermediate_size"],
        "vocab": config["vocab_size"],
    }
    assert shipped == {name: getattr(TINY, name) for name in shipped}


def test_the_readme_s_lines_write_the_placement_example(tmp_path: Path) -> None:
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'save("placement.yaml")' in block
    written = tmp_path / "placement.yaml"
    exec(
        block.replace('"placement.yaml"', repr(str(written))).replace(
            '"clusters/topology-edge-cloud.yaml"', repr(str(CLUSTERS / "topology-edge-cloud.yaml"))
        ),
        {},
    )
    assert Placement.load(written) == Placement.load(CLUSTERS / "placement-example.yaml")


def test_onprem_keeps_ray_s_schema() -> None:
    spec = importlib.util.find_spec("ray")  # finds the package without importing it
    assert spec and spec.origin
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(onprem(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**onprem(), "min_workers": 1}, schema)


def test_onprem_keeps_to_what_provider_local_takes() -> None:
    cluster = onprem()
    assert cluster["provider"]["type"] == "local"
    assert "available_node_types" not in cluster and "head_node_type" not in cluster
    assert cluster["provider"]["head_ip"] not in cluster["provider"]["worker_ips"]


@pytest.mark.parametrize(
    ("host", "resources"),
    [("edge0", {"edge": 1}), ("edge-kitchen", {"edge": 1}), ("cloud3", {"cloud": 1}), ("laptop", None)],
)
def test_a_worker_takes_its_resources_from_its_host_name(
    host: str, resources: dict[str, int] | None, tmp_path: Path
) -> None:
    """The start commands run in a real shell with `ray` and `hostname` replaced by stubs."""
    stubs = {"ray": 'printf "%s\\n" "$@"', "hostname": f"echo {host}"}
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}", "RAY_HEAD_IP": "192.0.2.10"}
    done = subprocess.run(
        ["bash", "-c", onprem()["worker_start_ray_commands"][-1]],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if resources is None:
        assert done.returncode == 1 and f"no rule for host {host}" in done.stderr and not done.stdout
        return
    start, address, flag = done.stdout.splitlines()
    assert (start, address) == ("start", "--address=192.0.2.10:6379"), done.stderr
    assert json.loads(flag.removeprefix("--resources=")) == resources
