"""The doctor: each finding has a status and, if it is not good, something to do."""

from __future__ import annotations

import json
import os
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner, Result

from splitray.commands.cli import app
from splitray.commands.doctor import examine as examined
from splitray.profiling import checks
from splitray.profiling.checks import Check

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Memory = namedtuple("Memory", ["available", "total"])


def examine(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def only(monkeypatch: pytest.MonkeyPatch, *findings: Check) -> None:
    def found() -> Iterator[Check]:
        yield from findings

    monkeypatch.setattr(checks, "CHECKS", {"this": found})


OK, ODD, BAD = Check("a", "ok", "fine"), Check("b", "warning", "odd", "look"), Check("c", "problem", "bad", "repair")


@pytest.mark.parametrize(
    ("made", "status", "code"),
    [((OK,), "ok", 0), ((OK, ODD), "warning", 0), ((ODD, BAD, OK), "problem", 1)],
    ids=["all is well", "a warning is no failure", "a problem is one"],
)
def test_the_worst_finding_decides(
    made: tuple[Check, ...], status: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, *made)
    result = examine("--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["status"]) == (code, status)
    assert [c["name"] for c in document["checks"]] == [c.name for c in made]
    assert all(set(c) == {"name", "status", "found", "todo"} for c in document["checks"])


def test_it_reads_line_by_line_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, OK, ODD, BAD)
    lines = [line.split() for line in examine().stdout.splitlines()]
    assert lines[:5] == [["ok", "a", "fine"], ["warning", "b", "odd"], ["look"], ["problem", "c", "bad"], ["repair"]]
    assert lines[-1] == ["1", "ok,", "1", "warning,", "1", "problem"]


def test_a_check_that_breaks_is_a_problem_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        yield OK
        raise OSError("no such thing")

    monkeypatch.setattr(checks, "CHECKS", {"broken": broken})
    document = examined(Console(quiet=True))
    assert [(c["status"], c["found"]) for c in document["checks"]] == [("ok", "fine"), ("problem", "no such thing")]


@pytest.mark.parametrize(
    ("installed", "status"),
    [("2.13.0+cpu", "ok"), ("2.12.1", "problem"), ("2.14.0", "problem"), ("not installed", "problem")],
)
def test_versions_are_those_the_package_declares(installed: str, status: str) -> None:
    check = checks._version("torch", installed, Requirement("torch>=2.13,<2.14"))
    assert check.status == status
    assert ">=2.13,<2.14" in check.found
    assert check.todo == ("" if status == "ok" else "pip install 'torch>=2.13,<2.14'")


def memory(free: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda m: m.setattr(psutil, "virtual_memory", lambda: Memory(free, 8e9))


def cores(number: int, load: float) -> Callable[[pytest.MonkeyPatch], None]:
    def change(m: pytest.MonkeyPatch) -> None:
        m.setattr(os, "sched_getaffinity", lambda _: set(range(number)))
        m.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))

    return change


@pytest.mark.parametrize(
    ("name", "change", "status", "words"),
    [
        ("memory", memory(5e9), "ok", "5.00 GB free of 8.00 GB"),
        ("memory", memory(2e9), "warning", "fewer devices"),
        ("memory", memory(5e8), "problem", "fewer devices"),
        ("cores", cores(4, 0.5), "ok", "4 usable"),
        ("cores", cores(4, 9.0), "warning", "busy"),
        ("cores", cores(1, 0.0), "warning", "two or more cores"),
        ("threads", lambda m: m.setenv("OMP_WAIT_POLICY", "PASSIVE"), "warning", "unset OMP_WAIT_POLICY"),
        ("threads", lambda m: m.delenv("OMP_WAIT_POLICY", raising=False), "ok", "each device process uses 1"),
        ("sockets", lambda m: m.setattr(checks, "_SLOW_ROUND_TRIP_S", 60.0), "ok", "there and back"),
        ("sockets", lambda m: m.setattr(checks, "_SLOW_ROUND_TRIP_S", 0.0), "warning", "exchange"),
        ("cluster", lambda m: m.setattr(checks, "running_cluster", lambda: None), "ok", "start their own"),
        ("gpu", lambda m: m.setattr("torch.cuda.is_available", lambda: False), "ok", "CPU"),
    ],
)
def test_each_check_says_what_it_saw(
    name: str, change: Callable[[pytest.MonkeyPatch], None], status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (check,) = checks.findings(name, checks.CHECKS[name])
    assert check.status == status
    assert words in f"{check.found} {check.todo}"


def test_a_cluster_that_is_gone_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (check,) = checks.findings("cluster", checks.CHECKS["cluster"])
    assert check.status == "problem"
    assert address in check.found
    assert "unset RAY_ADDRESS" in check.todo


def test_an_auth_token_file_is_pointed_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(checks, "running_cluster", lambda: None)
    found = checks.findings("cluster", checks.CHECKS["cluster"])
    assert [c.status for c in found] == ["warning", "ok"]
    assert "RAY_AUTH_MODE" in found[0].todo


def test_a_model_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("splitray.runtime.launch.SHIPPED", tmp_path)
    (check,) = checks.findings("model", checks.CHECKS["model"])
    assert (check.status, check.todo) == ("problem", "install splitray again")


@pytest.mark.usefixtures("forked_devices")
def test_the_shipped_model_split_over_two_processes_gives_transformers_tokens() -> None:
    found = checks.findings("model", checks.CHECKS["model"])
    assert [(c.name, c.status) for c in found] == [("model", "ok"), ("split", "ok")], found
