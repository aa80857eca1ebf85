"""Training as users start it: as a job on a cluster of two node processes, and on a private Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from ray_nodes import RayNodes

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-W", "ignore", "-m", "rllib_configs", "splitwise_smoke", "--iterations", "2"]
FILES = {"policy.safetensors", "policy.json", "progress.csv"}
SOON_S = 200.0  # an idle machine needs forty
AGENT_S, NO_AGENT = 90.0, "No available agent"


class NodesWithDashboard(RayNodes):
    """Jobs are submitted to the dashboard's port."""

    def _start(self, index: int, arguments: list[str], resources: Mapping[str, float]) -> None:
        if index == 0:
            with socket.create_server((self.hosts[0], 0)) as probe:
                self.port = probe.getsockname()[1]
            arguments = [a for a in arguments if "dashboard" not in a]
            arguments += [f"--dashboard-host={self.hosts[0]}", f"--dashboard-port={self.port}"]
            arguments += ["--include-dashboard=true"]
        with socket.create_server((self.hosts[index], 0)) as probe:  # the default port may be another cluster's
            arguments = [*arguments, f"--dashboard-agent-listen-port={probe.getsockname()[1]}"]
        super()._start(index, arguments, resources)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[NodesWithDashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = NodesWithDashboard([{"cloud": 1}, {"edge": 1}], first_host=41)
    try:
        yield nodes
    finally:
        nodes.close()


def finished(folder: Path, iterations: int) -> dict:
    """The run's card, after a look at what else is there."""
    assert {f.name for f in folder.iterdir()} >= FILES and any("tfevents" in f.name for f in folder.iterdir())
    rows = (folder / "progress.csv").read_text().splitlines()
    assert len(rows) == 1 + iterations
    assert {"placement/reward", "placement/latency", "placement/queue", "loop/slots_per_s"} <= set(rows[0].split(","))
    card = json.loads((folder / "policy.json").read_text())
    assert card["recipe"]["name"] == "splitwise_smoke" and len(card["results"]["held_out"]) == 3
    return card


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_a_job_trains_on_a_cluster_and_leaves_its_policy_in_the_shared_folder(two_nodes, tmp_path) -> None:
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    submit += [f"--address=http://{two_nodes.hosts[0]}:{two_nodes.port}", "--working-dir", str(ROOT), "--"]
    give_up = time.monotonic() + AGENT_S
    while True:
        done = subprocess.run(
            [*submit, *RUN, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=SOON_S,
            check=False,
        )  # fmt: skip
        # Nodes take jobs only once their dashboard agents are up, some time after `ray start` has said that it is done.
        if NO_AGENT not in done.stderr + done.stdout or time.monotonic() > give_up:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    finished(tmp_path / "splitwise_smoke", 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_the_command_prints_one_document_and_leaves_no_process(tmp_path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {"RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        [*RUN, "--out", str(tmp_path)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["recipe"] == "splitwise_smoke" and document["slots"] == 2 * 2 * 16 * 8
    assert all(Path(p).is_file() for p in document["policy"])
    finished(tmp_path / "splitwise_smoke", 2)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    for arguments, says in (
        (["--out", str(tmp_path / "other"), "--resume"], "nothing to resume"),
        (["--out", str(tmp_path)], "--resume goes on with it, or give another"),
        (["--out", str(tmp_path), "--resume", "--seed", "1"], "has the results of seed 0"),
    ):
        again = subprocess.run(
            [*RUN, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SOON_S, check=False
        )
        assert again.returncode == 2 and says in " ".join(again.stderr.split())
