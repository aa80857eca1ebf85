"""The order of imports, read off the syntax trees: what may stand on what, and who may know torch and Ray."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package imports itself and what stands left of it; packages of one floor do not import each other.
PACKAGES = (("splitray",), ("actors",), ("serve_apps", "rllib_configs"))

# The floors of a package, lowest first. A unit (a module, or a folder with all in it) imports itself and lower floors.
# A new unit needs a place here. `splitray` itself is a facade, which exports lazily from everywhere.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "splitray": (
        ("errors", "arrays"),
        ("user_file", "results", "scratch", "own_code"),
        ("yaml_document", "card", "ray_address", "signals", "unfinished"),
        ("weight_formats",),
        ("arch", "codecs", "channel", "text"),
        ("catalog",),
        ("topology",),
        ("placement",),
        ("fitted",),
        ("route", "migration", "profile"),
        ("queues", "quality"),
        ("cost",),
        ("papers",),
        ("planners", "model"),
        ("runtime",),
        ("sim", "prompts"),
        ("rl",),
        ("report",),
        ("local_ray",),
        ("profiling",),
        ("evaluate",),
        ("commands",),
    ),
    "splitray.runtime": (
        ("sampling", "checkpoint"),
        ("wire",),
        ("device",),
        ("fleet",),
        ("kept_fleet",),
        ("engine",),
        ("selftest", "timing", "device_formats"),
        ("remembered",),
        ("launch", "cache_handle"),
        ("refusals",),
        ("hf", "generation", "model_arch"),
    ),
    "splitray.runtime.wire": (
        ("frames", "endpoint", "packing", "free_cores"),
        ("connection", "answers", "waits"),
        ("wire", "messages"),
        ("listener", "tensors"),
        ("calls",),
    ),
    "splitray.runtime.device": (
        ("busy", "crossing", "speed", "lending"),
        ("fixed", "coded", "decode", "probes"),
        ("noisy",),
        ("holding",),
        ("kv_copy",),
        ("epochs",),
        ("side",),
        ("shard_host",),
        ("host_process",),
    ),
    "splitray.runtime.engine": (
        ("backoff", "run_report", "session", "asking", "shard_spec", "heirs"),
        ("epoch",),
        ("policy",),
        ("starts", "next_step"),
        ("members",),
        ("succession",),
        ("stepping", "protection", "segment", "monitor"),
        ("recovery", "returns"),
        ("upkeep",),
        ("engine",),
        ("controller",),
    ),
    "splitray.prompts": (
        ("prompt_line",),
        ("prompts_file", "answers_file"),
        ("identity", "answering"),
        ("run",),
    ),
    "splitray.text": (
        ("decoding", "dialogue", "ids", "stops"),
        ("detokenizer", "template_processes"),
        ("chat", "stream"),
    ),
    "splitray.planners": (
        ("protocol",),
        ("memory", "pairs"),
        ("layer_times",),
        ("optimum", "checked", "pay_back", "proposals", "random"),
        ("outside", "thrift", "whole"),
        ("cut", "dealt", "layer_dp", "myopic", "shares", "ucb"),
        ("myopic_search", "scored"),
        ("exact",),
        ("drift_plus_penalty",),
        ("coded", "best_weights"),
        ("make_planner",),  # of __init__.py, the table of names: no planner knows it
        ("priced",),
    ),
    "splitray.rl": (
        ("grid",),
        ("world",),
        ("policy_planner", "split_point"),
        ("training",),
    ),
}
# The commands stand on everything, and import actors and serve_apps inside their functions only.
COMMAND_LINE = ("commands", "local_ray", "ray_address")
# Found by name when they are asked for, as they stand higher: the learned policy, and the fleet of Ray actors.
BY_NAME = (("planners", "splitray.rl.policy_planner"), ("runtime", "actors.fleet"))
WITHOUT_TORCH = (
    "errors", "arch", "topology", "placement", "fitted", "codecs", "channel", "route", "quality.accuracy", "papers",
    "planners", "text",
)  # fmt: skip
# A process of its own has transformers, which without a model reads no torch.
WITH_TRANSFORMERS = ("splitray.text.template_processes",)
WITH_RAY = ("actors", "serve_apps", "rllib_configs", "splitray.rl")
WITHOUT_RAY = ("splitray.rl.policy_planner", "splitray.rl.grid", "splitray.rl.world")


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
        elif isinstance(node, ast.Call) and _named(node.func) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(importer, name.value, node.lineno, in_function)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(ast.parse(source), False))


def _named(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@functools.cache
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


def unit(module: str, package: str = "splitray") -> str:
    """The part of a package that a module belongs to; empty for the package itself and for modules of others."""
    inside = module.removeprefix(f"{package}.")
    return "" if inside == module else inside.split(".")[0]


def upward(imports: list[Import]) -> list[str]:
    """Imports that break the floors inside a package."""
    found = []
    for package, floors in FLOORS.items():
        floor = {name: level for level, names in enumerate(floors) for name in names}
        for i in imports:
            own, other = unit(i.importer, package), unit(i.imported, package)
            if not own or not (i.of(package) if package == "splitray" else other):
                continue
            if other not in floor or own not in floor:
                missing = own if own not in floor else other
                found.append(f"{i}: give {missing!r} a place in the floors of {package}, or import its module")
            elif own != other and floor[other] >= floor[own] and (own, i.imported) not in BY_NAME:
                found.append(f"{i}: not on a lower floor")
    return found


def between_rooms(imports: list[Import]) -> list[str]:
    """Imports of one room of the runtime by another one that talks to it over the wire."""
    engine, device = "splitray.runtime.engine", "splitray.runtime.device"
    return [str(i) for i in imports if (i.by(engine) and i.of(device)) or (i.by(device) and i.of(engine))]


def loops(imports: list[Import]) -> list[str]:
    """Modules that import each other in a loop; imports under TYPE_CHECKING and inside functions count."""
    modules = {i.importer for i in imports}
    found = []
    onto: dict[str, set[str]] = {m: set() for m in modules}
    for i in imports:
        target = i.imported if i.imported in modules else i.imported.rpartition(".")[0]
        if target in modules and target != i.importer and (unit(i.importer), i.imported) not in BY_NAME:
            onto[i.importer].add(target)

    def below(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = onto[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    found = sorted(m for m in modules if m in below(m))
    return [f"{m} is in a loop through {', '.join(sorted(onto[m] & set(found)))}" for m in found]


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
        if (unit(i.importer), i.imported) in BY_NAME:
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
    found = [i for i in imports if i.of("torch", "transformers", "safetensors") and i.by(*pure)]
    return [str(i) for i in found if not (i.of("transformers") and i.by(*WITH_TRANSFORMERS))]


RULES = {
    "floors": upward,
    "loops": loops,
    "engine and device": between_rooms,
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
    "the engine on the device": (
        between_rooms,
        "splitray.runtime.engine.x",
        "def f():\n import splitray.runtime.device",
    ),
    "an import upward inside the runtime": (upward, "splitray.runtime.device.x", "import splitray.runtime.hf"),
    "a planner on the table": (upward, "splitray.planners.cut", "from splitray.planners import make_planner"),
    "exact inside the optimum": (upward, "splitray.planners.optimum.x", "from splitray.planners.exact import solve"),
    "an import upward inside the learner": (upward, "splitray.rl.grid.x", "from splitray.rl.world import cell"),
    "an import upward by its name": (
        upward,
        "splitray.route",
        "import importlib as i\ni.import_module('splitray.cost')",
    ),
    "an actor by its name": (out_of_package, "splitray.route", "def f():\n import_module('actors.edge')"),
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


def test_a_loop_is_found_wherever_its_imports_stand() -> None:
    sources = {
        "splitray.a": "def f():\n from splitray import b",
        "splitray.b": "if TYPE_CHECKING:\n from splitray.c import Thing",
        "splitray.c": "import_module('splitray.a')",
        "splitray.d": "from splitray import a",
    }
    found = loops([i for name, source in sources.items() for i in imports_of(source, name)])
    assert [f.split()[0] for f in found] == ["splitray.a", "splitray.b", "splitray.c"]


@pytest.mark.parametrize(
    "module", ["splitray", "splitray.route", "splitray.papers.splitwise_drl", "splitray.planners", "splitray.text.chat"]
)
def test_a_fresh_interpreter_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
