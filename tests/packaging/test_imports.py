"""The order of imports, read off the syntax trees: what may stand on what, and who may know torch and Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package imports itself and what stands left of it; packages of one floor do not import each other.
PACKAGES = (("splitray",), ("actors",), ("serve_apps", "rllib_configs"))

# The floors of splitray, lowest first. A unit (a module, or a folder with all in it) imports itself and lower
# floors. A new unit needs a place here; one marked with a later issue may not exist yet.
FLOORS = (
    ("errors",),
    ("arch", "codecs", "channel", "json_table"),
    ("catalog",),
    ("topology",),
    ("placement",),
    ("route", "migration", "profile"),
    ("accuracy", "energy", "queues"),
    ("quality",),
    ("cost",),
    ("papers",),
    ("planners", "model"),
    ("runtime",),
    ("sim",),
    ("rl",),
    ("report",),
    ("local_ray", "perplexity", "profiling"),
    ("codec_loss", "fit_quality", "sweep", "generate", "plan", "serve", "demo", "bench", "doctor"),
    ("simulate",),
    ("evaluate",),
    ("cli", "__main__"),
)
FLOOR = {unit: level for level, units in enumerate(FLOORS) for unit in units}
# The command line stands on everything, and imports actors and serve_apps inside its functions only.
COMMAND_LINE = tuple(unit for units in FLOORS[-5:] for unit in units)
WITHOUT_TORCH = (
    "errors", "arch", "topology", "placement", "codecs", "channel", "route", "accuracy", "papers", "planners",
)  # fmt: skip
WITH_RAY = ("actors", "serve_apps", "rllib_configs", "splitray.rl")
WITHOUT_RAY = ("splitray.rl.policy_planner",)


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where it stands."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"

    def of(self, *packages: str) -> bool:
        return any(f"{self.imported}.".startswith(f"{p}.") for p in packages)

    def by(self, *packages: str) -> bool:
        return any(f"{self.importer}.".startswith(f"{p}.") for p in packages)


def imports_of(source: str, importer: str, *, is_package: bool = False) -> list[Import]:
    """Every import of a module, those under TYPE_CHECKING and inside functions as well."""
    package = importer if is_package else importer.rpartition(".")[0]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(importer, f"{base}.{alias.name}", node.lineno, in_function)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(ast.parse(source), False))


def all_imports() -> list[Import]:
    found = []
    for packages in PACKAGES:
        for package in packages:
            for path in sorted((ROOT / package).rglob("*.py")):
                parts = path.relative_to(ROOT).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                found += imports_of(path.read_text(encoding="utf-8"), name, is_package=is_package)
    return found


def unit(module: str) -> str:
    """The part of splitray that a module belongs to; empty for the facade `splitray` itself."""
    return module.split(".")[1] if "." in module else ""


def upward(imports: list[Import]) -> list[str]:
    """Imports that break the floors inside splitray."""
    found = []
    for i in imports:
        own = unit(i.importer)
        if not (i.by("splitray") and i.of("splitray")) or not own:
            continue  # the facade exports lazily from everywhere
        other = unit(i.imported)
        if other not in FLOOR or own not in FLOOR:
            found.append(f"{i}: give {own if own not in FLOOR else other!r} a place in FLOORS, or import its module")
        elif own != other and FLOOR[other] >= FLOOR[own]:
            found.append(f"{i}: not on a lower floor")
    return found


def out_of_package(imports: list[Import]) -> list[str]:
    """Imports that break the order of the packages."""
    level = {package: n for n, packages in enumerate(PACKAGES) for package in packages}
    found = []
    for i in imports:
        own, other = i.importer.split(".")[0], i.imported.split(".")[0]
        if other not in level or own == other or level[other] < level[own]:
            continue
        if own == "splitray" and unit(i.importer) in COMMAND_LINE and i.in_function:
            continue
        found.append(str(i))
    return found


def of_ray(imports: list[Import]) -> list[str]:
    """Imports of Ray where it has no place."""
    return [
        str(i)
        for i in imports
        if i.of("ray")
        and (not i.by(*WITH_RAY) or i.by(*WITHOUT_RAY))
        and not (unit(i.importer) in COMMAND_LINE and i.in_function)
    ]


def of_torch(imports: list[Import]) -> list[str]:
    """Imports of torch, or of what imports it, by modules that plan without weights."""
    pure = tuple(f"splitray.{u}" for u in WITHOUT_TORCH)
    return [str(i) for i in imports if i.of("torch", "transformers", "safetensors") and i.by(*pure)]


RULES = {
    "floors of splitray": upward,
    "order of the packages": out_of_package,
    "ray": of_ray,
    "torch": of_torch,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_import_keeps_the_order(rule) -> None:
    assert rule(all_imports()) == []


def test_the_trees_were_found() -> None:
    importers = {i.importer for i in all_imports()}
    assert {"splitray.route", "splitray.planners"} <= importers


REFUSED = {
    "a planner that imports the runtime": (upward, "splitray.planners.x", "import splitray.runtime.engine.engine"),
    "a name of the facade": (upward, "splitray.cost", "from splitray import Placement"),
    "an import upward in a function": (upward, "splitray.route", "def f():\n from splitray import cost"),
    "a relative import upward": (upward, "splitray.model.x", "from ..runtime import wire"),
    "a sibling on one floor": (upward, "splitray.planners.x", "from splitray.model import source"),
    "a unit without a floor": (upward, "splitray.utils", "from splitray import errors"),
    "the library on an actor": (out_of_package, "splitray.runtime.fleet", "def f():\n import actors.edge"),
    "the command line on an actor at the top": (out_of_package, "splitray.commands.cli", "import actors.edge"),
    "actors on Serve's apps": (out_of_package, "actors.edge", "from serve_apps import generate"),
    "recipes on Serve's apps": (out_of_package, "rllib_configs.ppo", "import serve_apps"),
    "ray in the runtime": (of_ray, "splitray.runtime.fleet", "def f():\n import ray"),
    "ray at the top of the command line": (of_ray, "splitray.commands.cli", "from ray import serve"),
    "ray in the policy planner": (of_ray, "splitray.rl.policy_planner", "import ray.rllib"),
    "torch in a planner": (of_torch, "splitray.planners.x", "def f():\n from torch import nn"),
    "transformers in arch": (of_torch, "splitray.arch", "from transformers import AutoConfig"),
}
ALLOWED = {
    "a lower floor": (upward, "splitray.runtime.x", "from splitray.model.source import Checkpoint"),
    "one's own unit": (upward, "splitray.planners.cut", "from splitray.planners.whole import clouds"),
    "the facade, lazily": (upward, "splitray", "def f():\n from splitray.runtime.hf import SplitModel"),
    "the command line in its functions": (out_of_package, "splitray.commands.cli", "def f():\n import actors.edge"),
    "apps on actors on the library": (out_of_package, "serve_apps.generate", "import actors, splitray.route"),
    "ray in the learner": (of_ray, "splitray.rl.training.learner", "import ray.rllib"),
    "ray in a function of the doctor": (of_ray, "splitray.commands.doctor", "def f():\n import ray"),
    "a name that only begins like ray": (of_ray, "splitray.runtime.x", "import raylib"),
    "torch in the model": (of_torch, "splitray.model.source", "import torch"),
}


@pytest.mark.parametrize(("rule", "importer", "source"), REFUSED.values(), ids=REFUSED)
def test_the_rules_refuse(rule, importer: str, source: str) -> None:
    assert rule(imports_of(source, importer))


@pytest.mark.parametrize(("rule", "importer", "source"), ALLOWED.values(), ids=ALLOWED)
def test_the_rules_allow(rule, importer: str, source: str) -> None:
    assert rule(imports_of(source, importer, is_package=importer == "splitray")) == []


@pytest.mark.parametrize("module", ["splitray", "splitray.route", "splitray.papers.splitwise_drl", "splitray.planners"])
def test_a_fresh_interpreter_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
