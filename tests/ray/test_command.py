"""`python -m actors` as users run it: against three node processes, and against a Ray of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from conformance import FFN_2, GROUPS, HEADS_3, PROMPT, SOON_S, eventually, expected, on, placed, small_model
from transformers import PreTrainedModel

from actors.__main__ import Interrupt, _stay, main
from actors.cluster import Membership
from actors.roster import pieces
from splitray.runtime.fleet import ThreadFleet

ROOT = Path(__file__).resolve().parents[2]
RATES = {"memory_bytes": 1e9, "compute_flops": 1e10, "memory_bandwidth_bytes_per_s": 1e10}
LINK = {"bandwidth_bytes_per_s": 1e9, "rtt_s": 1e-4}
IDS = ",".join(str(i) for i in PROMPT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("model")
    return small_model(folder), folder


def topology(folder: Path, *devices: str) -> str:
    document = {
        "devices": [{"id": d, "tier": d.rstrip("0123456789"), **RATES} for d in devices],
        "links": [{"between": [a, b], **LINK} for i, a in enumerate(devices) for b in devices[i + 1 :]],
    }
    path = folder / f"{'-'.join(devices)}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a shell starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "actors", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def first_document(process: subprocess.Popen[str]) -> dict:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return json.loads(line)


@pytest.mark.ray
def test_it_generates_over_three_nodes_and_each_device_sits_where_its_resource_is(nodes, model, tmp_path) -> None:
    where = topology(tmp_path, "edge0", "edge1", "cloud0")
    arguments = ["--topology", where, "--model", str(model[1]), "--planner", "even", "--address", nodes.address]
    with command(*arguments, "--prompt-ids", IDS, "--max-new-tokens", "12", "--json") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    document = json.loads(out)  # one document and nothing else
    assert document["token_ids"] == expected(model[0])
    seats = {d: values["node_ip"] for d, values in document["devices"].items()}
    assert seats == {"cloud0": nodes.hosts[0], "edge0": nodes.hosts[1], "edge1": nodes.hosts[2]}
    assert len({values["node_id"] for values in document["devices"].values()}) == 3
    assert document["text"] is None and document["exchanges_per_token"] > 0 and document["bytes_per_token"] > 0
    for device, values in document["devices"].items():
        assert values["weight_bytes"] > 0 and any(p.startswith("layers [0, ") for p in values["pieces"])
        assert f"{device}: node {values['node_ip']}" in err and f"process {values['pid']}" in err
        assert eventually(partial(_ended, values["pid"]))


def _ended(pid: int) -> bool:
    return not psutil.pid_exists(pid)


class DyingFleet(ThreadFleet):
    """Says at its second look that a device has died."""

    looks = 0

    def dead(self) -> dict[str, str]:
        self.looks += 1
        return {} if self.looks < 2 else {"edge0": "its actor died: for a reason"}


def test_a_device_that_dies_ends_a_waiting_command_with_its_reason(monkeypatch, capsys) -> None:
    monkeypatch.setattr("actors.__main__._LOOK_S", 0.01)
    monkeypatch.setattr("actors.__main__._run", lambda *_, **__: _stay(DyingFleet(), Interrupt()))
    assert run("--model", "tiny", "--topology", "any.yaml") == 1
    assert capsys.readouterr().err == "a device was lost: edge0: its actor died: for a reason\n"


@pytest.mark.ray
@pytest.mark.full
def test_ctrl_c_ends_a_command_with_a_ray_of_its_own_and_leaves_nothing(model, tmp_path) -> None:
    arguments = ["--topology", topology(tmp_path, "edge0"), "--model", str(model[1]), "--address", "local"]
    # A folder of its own for what Ray writes, for others start a Ray as well; short, as Ray's socket paths have to be.
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as folder:
        interrupted(arguments, folder)
        assert not list(Path(folder).glob("*splitray-*"))


def interrupted(arguments: list[str], folder: str) -> None:
    with command(*arguments, "--json", TMPDIR=folder) as process:
        first_document(process)
        tree = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in p.name() for p in tree)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        _, err = process.communicate(timeout=2 * SOON_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert eventually(lambda: not [p for p in tree if p.is_running()])


GOOD = ["--model", "MODEL", "--topology", "TOPOLOGY"]
REFUSED = {
    "a topology that is not there": (["--model", "MODEL", "--topology", "nowhere.yaml"], "nowhere.yaml"),
    "a model that is not there": (["--model", "nowhere", "--topology", "TOPOLOGY"], "nowhere"),
    "an unknown planner": ([*GOOD, "--planner", "evven"], "did you mean even"),
    "ids that are no numbers": ([*GOOD, "--prompt-ids", "1,b"], "'1,b'"),
    "a text for a model without a tokenizer": ([*GOOD, "--prompt", "hello"], "--prompt-ids"),
    "no new tokens": ([*GOOD, "--prompt-ids", "1", "--max-new-tokens", "0"], "max_new_tokens"),
    "an address of a Ray client": ([*GOOD, "--address", "ray://127.0.0.1:1"], "ray start"),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_told_with_a_remedy_and_exit_code_2(arguments, says, model, tmp_path, capsys, monkeypatch) -> None:
    # As if this process had not joined the cluster of the other tests.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(Membership, "_sharers", [])
    names = {"MODEL": str(model[1]), "TOPOLOGY": topology(tmp_path, "edge0")}
    assert run(*[names.get(a, a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err and "expected" in err and says in err


def test_an_address_where_nobody_answers_ends_it_with_exit_code_1(model, tmp_path, capsys) -> None:
    where = topology(tmp_path, "edge0")
    assert run("--model", str(model[1]), "--topology", where, "--address", "127.0.0.1:1") == 1
    _, err = capsys.readouterr()
    assert "127.0.0.1:1 (of --address)" in err and "Connection refused" in err and "unset RAY_ADDRESS" in err


def run(*arguments: str) -> int:
    """The command in this process, whose signal handlers it leaves as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_ctrl_c_counts_although_a_callback_has_swallowed_it(monkeypatch) -> None:
    def swallowed(_: object, interrupt: Interrupt, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupt.wait()

    monkeypatch.setattr("actors.__main__._run", swallowed)
    assert run("--model", "tiny", "--topology", "any.yaml") == 130


def test_pieces_name_what_a_device_holds_with_equal_layers_in_one_line() -> None:
    placement = placed(*[(HEADS_3, FFN_2)] * 2, (on("edge0", GROUPS), FFN_2))
    assert pieces(placement, "edge0") == [
        "embedding",
        "layers [0, 2): head groups [0, 1), FFN [0, 17)",
        "layers [2, 3): head groups [0, 3), FFN [0, 17)",
        "head: rows [0, 97)",
    ]
    assert pieces(placement, "cloud1") == ["layers [0, 2): head groups [2, 3)"]
    assert pieces(placement, "edge9") == ["no piece: prompts start and tokens end here"]
