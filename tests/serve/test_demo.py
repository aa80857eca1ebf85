"""`splitray demo` as its users run it: a program that needs nothing, shows everything and leaves nothing."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.serve, pytest.mark.slow]

MARK = "SPLITRAY_TEST_MARK"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program whose every descendant can be found; none may be left in the end."""
    value = secrets.token_hex(8)
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, "-m", "splitray.commands.cli", *map(str, arguments)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, MARK: value},
        )  # fmt: skip
        started.append(program)
        return program

    yield run
    left = [p for p in psutil.process_iter() if _environment(p).get(MARK) == value]
    for process in left:
        process.kill()
    for program in started:
        program.communicate()
    assert not left


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.full
def test_it_ends_with_identical_tokens_and_leaves_its_results(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    started = time.monotonic()
    program = start("demo", "--json", "--out", tmp_path / "out")
    printed, out = program.communicate(timeout=300)  # with --json all that is for people goes to stderr
    print(f"the demo took {time.monotonic() - started:.0f} s")
    lines = out.splitlines()
    assert (program.returncode, lines[-1]) == (0, "tokens identical to transformers")
    for words in ("EdgeActor", "CloudActor", "time to first token", "exchanges per token", "process memory"):
        assert words in out
    assert "\x1b" not in out
    document = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert json.loads(printed) == document
    assert document["identical"] and document["difference"] is None
    assert document["text"] in out
    assert [p["name"] for p in document["planners"]] == ["exact", "splitwise", "the placement above"]
    assert "Planner exact would put" in out and "Planner splitwise would put" in out
    for each in document["planners"]:  # the bench holds predictions to per cents, an unquiet test to their order
        assert 0.1 < each["predicted_tpot_s"] / each["measured_tpot_s"] < 10
    drop = {p["name"]: p for p in document["link_drop"]["phases"]}
    least_s = document["bytes_per_token"] / 2 / document["link_drop"]["link_bytes_per_s"]  # both directions at once
    assert drop["the link is slow"]["measured_tpot_s"] > 0.7 * least_s
    assert drop["moved"]["tokens"] > 10 and document["link_drop"]["placement"] != document["placement"]
    assert document["ttft_s"] > 0 and document["bytes_per_token"] > 0
    for values in document["devices"].values():
        assert values["rss_anon_bytes"] > 1e8
        assert values["weight_bytes"] > 0
    picture = (tmp_path / "out" / "placement.txt").read_text()
    assert all(line.rstrip() in out for line in picture.splitlines())
    assert (tmp_path / "out" / "placement.svg").read_text().startswith("<svg")


@pytest.mark.full
@pytest.mark.parametrize("num_processes", [3, 12], ids=["while Ray starts", "while the devices load"])
def test_ctrl_c_in_the_middle_leaves_nothing(start: Callable[..., subprocess.Popen[str]], num_processes: int) -> None:
    program = start("demo")
    deadline = time.monotonic() + 200
    while len(psutil.Process(program.pid).children(recursive=True)) < num_processes:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert err == "error: interrupted; everything that was started has been stopped\n"
