"""Planners that users bring: found in the working directory, checked like ours, and every mistake named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_planners import ARCH, refused

from splitray.errors import InputError, PlacementError, PlannerError
from splitray.placement import Placement
from splitray.planners import ClusterState, make_planner
from splitray.planners.cut import FixedCut
from splitray.planners.whole import CloudOnly, EdgeOnly, whole_on
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.launch import decide
from splitray.sim.arena import Case, run
from splitray.sim.scenario import Scenario
from splitray.sim.workload import poisson
from splitray.topology import DeviceId, Topology

WHERE = Topology.uniform(2)
EDGE, CLOUD = WHERE.ids
STATE = ClusterState(arch=ARCH, topology=WHERE)
GOOD = """
from splitray.planners.whole import whole_on

CALLS = []

class Mine:
    space, once, charges_moves = "one_device", True, True

    def __init__(self, wanted="edge0"):
        self.wanted = wanted

    def propose(self, state):
        CALLS.append(state)
        return whole_on(self.wanted, state)

class Learns(Mine):
    def observe(self, state, placement, *, tpot_s, energy_j_per_token):
        raise KeyError("no tpot")

class Late:
    def propose(self, state):
        from {name}_neighbour import WANTED  # when sys.path has long been put back
        return whole_on(WANTED, state)

class Odd:
    space = "everything"
    def propose(self, state): ...

class Yes:
    once = "yes"
    def propose(self, state): ...

class Fails(Mine):
    def propose(self, state):
        return state.nothing

class Half(Mine):
    def propose(self, state):
        return {{"layers": []}}

class Elsewhere(Mine):
    def propose(self, state):
        return whole_on("moon", state)

class Nothing:
    pass

def propose(state):
    return whole_on("cloud0", state)

READY = Mine("cloud0")
NUMBER = 3
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own for every test, as a module is imported once only, in a working directory of its own."""
    name = f"outside_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(GOOD.format(name=name))
    (tmp_path / f"{name}_neighbour.py").write_text('WANTED = "cloud0"\n')
    (tmp_path / "even.py").write_text("raise RuntimeError('never imported')\n")
    package = tmp_path / f"{name}_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text("from .other import Mine as Mine\n")
    (package / "other.py").write_text(GOOD.format(name=name))
    (tmp_path / f"{name}_relative.py").write_text("from .other import Mine\n")
    (tmp_path / f"{name}_broken.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / f"{name}_exits.py").write_text("raise SystemExit('no')\n")
    (tmp_path / f"{name}_syntax.py").write_text("def f(:\n")
    (tmp_path / f"{name}_lacks.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return name


@pytest.mark.parametrize(
    ("spec", "device"),
    [
        ("{}:Mine", EDGE),
        ("{}:Mine:cloud0", CLOUD),
        ("{}:propose", CLOUD),
        ("{}:READY", CLOUD),
        ("{}:Late", CLOUD),
        ("{}_package.inner:Mine", EDGE),
        ("{}_package.other:Mine:cloud0", CLOUD),
    ],
)
def test_it_is_imported_from_the_working_directory(name: str, spec: str, device: DeviceId) -> None:
    before = list(sys.path)
    planner = make_planner(spec.format(name))
    assert sys.path == [*before, os.getcwd()], "last, so that no file here hides a library"
    placement = planner.propose(STATE)
    assert placement == whole_on(device, STATE) and planner.spec == spec.format(name)


def test_it_says_of_itself_what_the_table_says_of_known_planners(name: str) -> None:
    mine, plain = make_planner(f"{name}:Mine"), make_planner(f"{name}:propose")
    assert (mine.space, mine.once, mine.heeds_queues, mine.charges_moves) == ("one_device", True, False, True)
    assert (plain.space, plain.once, plain.heeds_queues, plain.charges_moves) == ("all", False, False, False)
    assert make_planner(f"{name}:Learns").learns and not mine.learns


def test_an_argument_may_hold_colons(name: str) -> None:
    planner = make_planner(f"{name}:Mine:a:b:c").planner
    assert planner.wanted == "a:b:c"  # type: ignore[attr-defined]


WRONG = {
    "evn:Mine": ("a known planner, or a module evn in ", "got neither", "did you mean even?"),
    "even:Mine": ("expected even without an argument", "or rename even.py, as known names come first"),
    "{}.py:Mine": ("name the module and not its file: ", ":Mine"),
    "./{}.py:Mine": ("a dotted module and a class in it",),
    "{}:": ("a dotted module and a class in it", "mine:Mine"),
    ":Mine": ("a dotted module and a class in it",),
    "{}::x": ("a dotted module and a class in it",),
    "{}:Mine:": ("a dotted module and a class in it",),
    ".{}:Mine": ("a dotted module and a class in it",),
    "{}..x:Mine": ("a dotted module and a class in it",),
    "{}": ("one of edge_only", "or module:Class[:ARG]"),
    "{}:Absent": ("expected a class Absent in ", "Mine, Learns"),
    "{}_package:Mine": ("planners there: none",),
    "{}_package.absent:Mine": ("got neither",),
    "{}:Nothing": ("expected an object with propose(ClusterState)", "the class", "propose(state)"),
    "{}:NUMBER": ("an object with propose(ClusterState)", "got 3"),
    "{}:Mine:a:b": (),
    "{}:propose:3": ("without an argument", "only a class takes one"),
    "{}:READY:3": ("without an argument",),
    "{}:Late:3": ("that Late('3') makes a planner", "TypeError", "takes no arguments"),
    "{}:Odd": ("space to be one of one_device, layers, heads, all", "'everything'"),
    "{}:Yes": ("once to be one of True, False", "'yes'"),
    "{}_broken:Mine": ("can be imported", "ZeroDivisionError: division by zero (", "_broken.py:2)"),
    "{}_exits:Mine": ("can be imported", "SystemExit: no"),
    "{}_syntax:Mine": ("SyntaxError", "_syntax.py:1)"),
    "{}_lacks:Mine": ("No module named 'a_library_that_is_not_there'", "_lacks.py:1)"),
    "{}_relative:Mine": ("ImportError: attempted relative import",),
}


@pytest.mark.parametrize(("spec", "texts"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_used_is_refused_by_name(name: str, spec: str, texts: tuple[str, ...]) -> None:
    spec = spec.format(name)
    if not texts:  # made, and refused with what it proposes
        refused(lambda: make_planner(spec).propose(STATE), f"planner {spec}", "a:b")
        return
    refused(lambda: make_planner(spec), *texts)


def test_its_own_mistakes_are_told_with_its_name_and_their_cause(name: str) -> None:
    with pytest.raises(
        PlannerError, match=rf"planner {name}:Fails: expected propose without .*AttributeError"
    ) as error:
        make_planner(f"{name}:Fails").propose(STATE)
    assert isinstance(error.value.__cause__, AttributeError) and f"{name}.py:" in str(error.value)
    with pytest.raises(PlannerError, match=r"a splitray\.Placement from propose, got \{'layers': \[\]\} of type dict"):
        make_planner(f"{name}:Half").propose(STATE)
    with pytest.raises(PlacementError, match=rf"planner {name}:Elsewhere: .*moon"):
        make_planner(f"{name}:Elsewhere").propose(STATE)
    with pytest.raises(PlannerError, match=f"planner {name}:Learns: expected observe"):
        make_planner(f"{name}:Learns").observe(STATE, whole_on(EDGE, STATE), tpot_s=1, energy_j_per_token=1)


def test_an_error_of_ours_stays_as_it_is() -> None:
    class Fails:
        def propose(self, state: ClusterState) -> Placement:
            raise InputError("memory", expected="more", actual="less", remedy="add some")

    with pytest.raises(InputError, match="memory: expected more, got less; add some"):
        make_planner(Fails()).propose(STATE)


class Named:
    name = "ours"

    def propose(self, state: ClusterState) -> Placement:
        return whole_on(CLOUD, state)


def test_an_object_is_a_planner_and_has_a_name() -> None:
    def chosen(state: ClusterState) -> Placement:
        return whole_on(CLOUD, state)

    by_function: Any = chosen  # taken too, though the types ask for an object with `propose`
    names = {make_planner(p).spec for p in (EdgeOnly(), Named(), by_function, None, "cloud_only")}
    assert names == {"EdgeOnly", "ours", "chosen", "even", "cloud_only"}
    checked = make_planner("even")
    assert make_planner(checked) is checked
    assert make_planner(by_function).propose(STATE) == whole_on(CLOUD, STATE)
    for wrong, text in ((Named, r"write Named\(\)"), (3, "got 3"), (object(), "propose")):
        with pytest.raises(PlacementError, match=text):
            make_planner(wrong)  # type: ignore[arg-type]


def test_every_way_into_the_engine_takes_an_object() -> None:
    placement, _ = decide(ARCH, WHERE, planner=FixedCut(2), placement=None)
    assert placement == make_planner("fixed_cut:2").propose(STATE)
    assert Recovery(replan=Named()).placement(ARCH, WHERE, 0) == whole_on(CLOUD, STATE)
    assert Recovery(replan=lambda *_: placement).placement(ARCH, WHERE, 0) == placement
    with pytest.raises(PlacementError, match="did you mean even"):
        Recovery(replan="evn")


def scenario() -> Scenario:
    import numpy as np

    requests = poisson(0.5, 20, rng=np.random.default_rng(1))
    return Scenario(name="", arch=ARCH, topology=WHERE, requests=requests, num_slots=20)


def test_a_simulation_takes_an_object_beside_a_name() -> None:
    mine, known = run([Case(planner=p, scenario=scenario()) for p in (CloudOnly(), "cloud_only")])
    assert (mine.planner, known.planner) == ("CloudOnly", "cloud_only")
    assert mine.finish_s == pytest.approx(known.finish_s)


def test_a_simulation_does_not_hide_a_planner_that_is_wrong() -> None:
    class Fails:
        def propose(self, state: ClusterState) -> Placement:
            raise KeyError("gone")

    with pytest.raises(PlannerError, match="planner Fails: .*KeyError: 'gone'"):
        run([Case(planner=p, scenario=scenario()) for p in ("even", Fails())])


def test_a_console_script_finds_the_file_beside_the_user(name: str, tmp_path: Path) -> None:
    """Its own folder is first on sys.path, and not the working directory."""
    script = tmp_path / "bin" / "tool"
    script.parent.mkdir()
    script.write_text("import sys\nfrom splitray.planners import make_planner\nprint(make_planner(sys.argv[1]).spec)\n")
    done = subprocess.run([sys.executable, str(script), f"{name}:Mine"], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == (f"{name}:Mine", 0), done.stderr


def test_an_app_of_serve_takes_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve")
    from serve_apps.generate import Args, build

    assert build(Args(planner=f"{name}:Mine:cloud0", replan=f"{name}:Mine"))
    launched: dict[str, Any] = {}
    monkeypatch.setattr("splitray.runtime.launch.launch_engine", lambda **options: launched.update(options))
    from serve_apps import generate

    generate._launch(Args(planner=f"{name}:Mine:cloud0"))
    assert make_planner(launched["planner"]).propose(STATE) == whole_on(CLOUD, STATE)
