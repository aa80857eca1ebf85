"""What all tests share: no network, which part of the tests runs, which of them stay together, and one Ray cluster.

`--part quick` (`make test`) leaves out what is marked `full` and, of a set marked `thin(k)`, all but one row in k;
`--part rest` runs exactly what that leaves out; without the option everything runs. Each run says how many tests it
left out. Makefile gives each worker of pytest-xdist whole files, so that what a file shares is made once.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest

if TYPE_CHECKING:
    from api_server import Served
    from forked_devices import Nursery
    from ray_nodes import RayNodes
    from torch import Tensor

    from splitray.topology import Device

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ["SPLITRAY_CACHE"] = ""  # self-tests are run, and nothing is kept in the folder of whoever runs them
# Under nohup and in the background of a script they are ignored: programs that tests interrupt would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

PARTS = ("all", "quick", "rest")
# Ray gives a node 30 s to start, and links are shaped in real time: neither bears a neighbour on two cores.
BY_THEMSELVES = ("ray", "netlab")
# so that no worker is left with them when the others have ended
LONG_FIRST = (
    "tests/ray/",
    "tests/netlab/",
    "tests/packaging/test_readme",
    "tests/unit/test_cli",
    "tests/unit/test_conformance",
)
LEFT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, default="all", help="quick: make test; rest: what quick leaves out")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The two phases of `make test` do not import what only the other one runs: that costs a third of a minute."""
    chosen, path = config.getoption("markexpr"), collection_path
    if chosen not in ("alone", "not alone") or not path.match("tests/*/test_*.py"):
        return None
    by_itself = path.parent.name in BY_THEMSELVES
    if chosen == "not alone":
        return by_itself or None
    return None if by_itself or re.search(r"mark\.(alone|ray|serve)\b", path.read_text()) else True


@pytest.hookimpl(tryfirst=True)  # before the tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part != "all":
        left = left_to_rest(items)
        out = [item for item in items if (item in left) == (part == "quick")]
        items[:] = [item for item in items if (item in left) == (part == "rest")]
        config.hook.pytest_deselected(items=out)
        config.stash[LEFT] = len(out)
    for item in items:
        if item.path.parent.name in BY_THEMSELVES or item.get_closest_marker("ray") or item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.alone)
    items.sort(key=lambda item: next((i for i, path in enumerate(LONG_FIRST) if item.nodeid.startswith(path)), 99))


@pytest.fixture
def no_device_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is to be refused before one does."""
    from splitray.runtime import launch

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a device starts")

    monkeypatch.setattr(launch, "Engine", refuse)


@pytest.fixture
def logits_of(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits from which every token of a run with a temperature is drawn."""
    from splitray.runtime.sampling import Chooser

    seen: list[Tensor] = []
    draw = Chooser.from_logits

    def noted(self: Chooser, logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV.clone())
        return draw(self, logits_BV)

    monkeypatch.setattr(Chooser, "from_logits", noted)
    return seen


def left_to_rest(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """What `quick` leaves out. The rows of a set are drawn by a checksum of their names: the same on every machine."""
    left = {item for item in items if item.get_closest_marker("full")}
    sets: dict[tuple[str, str], dict[str, list[pytest.Item]]] = {}
    shares: dict[tuple[str, str], int] = {}
    for item in items:
        mark = item.get_closest_marker("thin")
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if mark is None or item in left or mark.kwargs.get("whole", "") not in {"", *params}:
            continue
        values = {k: str(v) for k, v in params.items()}
        kept_each = values[mark.kwargs["each"]] if "each" in mark.kwargs else ""
        row = values[mark.kwargs["whole"]] if "whole" in mark.kwargs else item.nodeid
        scope = item.nodeid.partition("[")[0] if "whole" not in mark.kwargs else item.nodeid.rpartition("::")[0]
        shares[scope, kept_each] = mark.args[0]
        sets.setdefault((scope, kept_each), {}).setdefault(row, []).append(item)
    for key, rows in sets.items():
        drawn = sorted(rows, key=lambda row: crc32(row.encode()))
        for row in drawn[-(-len(drawn) // shares[key]) :]:
            left.update(rows[row])
    return left


def pytest_report_header(config: pytest.Config) -> str:
    return {
        "all": "all tests",
        "quick": "the part of make test; the rest: make test-rest, all: make test-all",
        "rest": "the rest of make test-all, behind make test",
    }[config.getoption("--part")]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist tells how many tests it left out; all tell the same."""
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash.get(LEFT, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    part, left = config.getoption("--part"), config.stash.get(LEFT, 0)
    if part != "all":
        other = "make test-rest" if part == "quick" else "make test"
        terminalreporter.write_line(f"{left} tests are not of this part: {other} runs them")


@pytest.fixture(scope="session")
def nodes() -> Iterator[RayNodes]:
    """Three node processes: clouds, edges, and one that only edge1 may use. This process is in their cluster."""
    from ray_nodes import RayNodes

    from actors.cluster import Membership

    nodes = RayNodes(
        [{"cloud": 4}, {"edge": 2}, {"edge1": 1}]
    )  # a resource with a device's id: only that one sits there
    try:
        membership = Membership(address=nodes.address)
        yield nodes
        membership.leave()
    finally:
        nodes.close()


@pytest.fixture
def served() -> Iterator[Served]:
    """A server whose engine the test scripts; a fresh one each."""
    from api_server import serving
    from fake_engine import FakeEngine

    engine = FakeEngine()
    with serving(engine) as served:
        yield served
    assert engine.closed, "the end of the server closes the engine"
    assert len(engine.threads) <= 1, "one thread has the engine"


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """One process that has read torch, to fork device processes from."""
    from forked_devices import Nursery

    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="class")
def forked_devices(nursery: Nursery) -> Iterator[None]:
    """Device processes of this machine start in a tenth of a second, where the test is not about their start."""
    from forked_devices import spawn

    from splitray.runtime.fleet import ProcessFleet

    started_anew = ProcessFleet._spawn

    def start(fleet: ProcessFleet, device: Device) -> None:
        if fleet.prefix_of(device.id):
            started_anew(fleet, device)
        else:
            spawn(nursery, fleet, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessFleet, "_spawn", start)
        yield
