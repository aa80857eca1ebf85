"""What comments, docstrings and pages point at exists: files, modules and rows of docs/equations.md.

A path counts as there if it is one from the root of the repository, from the folder of the file that names it, or from
any folder between the two: all of `splitray/` may leave out the folder of `splitray/cost.py`, and only the room `sim`
that of its own files.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("splitray", "actors", "serve_apps", "rllib_configs", "clusters", "tests", "docs", "examples", "benchmarks")
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
PACKAGES = ("splitray", "actors", "serve_apps", "rllib_configs")

# What a user, a run or another project makes or has: named in examples, not ours to have.
NOT_OURS = {
    "__init__.py",
    "placement.yaml", "topology.yaml", "devices.yaml", "here.yaml", "mine.py", "report.md", "MODEL_CARD.md",
}  # fmt: skip
# Decisions and the changelog tell of files as they were on their day.
HISTORY = ("CHANGELOG.md", "docs/decisions/")

PATH = re.compile(r"(?<![\w/.~$<{*:-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|yml|toml))\b(?![\w/]|\.\w)")
MODULE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+)(?![\w/])")
EQUATION = re.compile(r"\b(E[1-6]\.(?:\d+|[A-Z])|[CK]\d+)\b")
NOWHERE = re.compile(r"\b(SPEC|DESIGN|FACTS)\b")


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every line of a page; of a Python file the comments, and the strings that stand alone (docstrings)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from enumerate(node.value.value.splitlines(), node.lineno)


def files() -> list[Path]:
    """Everything that people read and write here."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    found += [ROOT / name for name in TOP]
    return [p for p in found if p.suffix in {".py", ".md", ".yaml", ".toml"} or p.name == "Makefile"]


def is_there(name: str, named_by: Path) -> bool:
    """Whether a path exists, seen from the file that names it."""
    folder = named_by.parent
    while True:
        if (folder / name).exists():
            return True
        if folder == ROOT:
            return False
        folder = folder.parent


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, or a name that its last module defines or mentions."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        for path in (ROOT.joinpath(*parts[:n]).with_suffix(".py"), ROOT.joinpath(*parts[:n]) / "__init__.py"):
            if path.exists():
                rest = parts[n : n + 1]
                return not rest or re.search(rf"\b{rest[0]}\b", path.read_text(encoding="utf-8")) is not None
    return False


def equations() -> set[str]:
    """The numbers that docs/equations.md has."""
    return set(EQUATION.findall((ROOT / "docs/equations.md").read_text(encoding="utf-8")))


def stale(path: Path, known: set[str]) -> Iterator[str]:
    """What a file cites and nobody has."""
    here = path.relative_to(ROOT).as_posix()
    cites_equations = path.suffix == ".py" and "docs/equations.md" in path.read_text(encoding="utf-8")
    for line, words in words_of(path):
        at = f"{here}:{line} cites"
        yield from (f"{at} {name}, which is no file here" for name in NOWHERE.findall(words))
        if here.startswith(HISTORY):
            continue
        for name in PATH.findall(words):
            if name.rpartition("/")[2] not in NOT_OURS and not is_there(name, path):
                yield f"{at} {name}, which does not exist"
        yield from (f"{at} {name}, which is no module" for name in MODULE.findall(words) if not is_module(name))
        if cites_equations:
            found = EQUATION.findall(words)
            yield from (f"{at} {name}, which docs/equations.md lacks" for name in found if name not in known)


@pytest.mark.parametrize("folder", [*FOLDERS, ""], ids=lambda folder: folder or "top")
def test_nothing_is_cited_that_is_not_there(folder: str):
    known = equations()
    inside = [p for p in files() if p.relative_to(ROOT).as_posix().startswith(f"{folder}/")]
    if not folder:
        inside = [p for p in files() if p.parent == ROOT]
    assert inside, f"{folder} has no files"
    assert [found for path in inside for found in stale(path, known)] == []


CITED = {
    "a file that is gone": ("# see splitray/rl/foresight.py", "does not exist"),
    "a file of another folder by its bare name": ("# see arena.py", "does not exist"),
    "a page that nobody wrote": ('"""See docs/nothing.md."""', "does not exist"),
    "a module that has moved": ('"""As `splitray.simulate` does."""', "no module"),
    "a name that a module lacks": ('"""As `splitray.route.Rout` does."""', "no module"),
    "a paper's row that is not on the page": ('"""docs/equations.md E4.99."""', "docs/equations.md lacks"),
    "a document outside the repository": ("# SPEC 4.2", "no file here"),
}


@pytest.mark.parametrize(("source", "told"), CITED.values(), ids=CITED)
def test_a_stale_citation_is_found(source: str, told: str, monkeypatch: pytest.MonkeyPatch):
    path = ROOT / "splitray" / "not_written.py"
    monkeypatch.setattr(Path, "read_text", _with(path, f"{source}\n", Path.read_text))
    (found,) = stale(path, equations())
    assert told in found


def _with(path: Path, text: str, usual):
    return lambda self, *a, **k: text if self == path else usual(self, *a, **k)


def test_code_may_use_the_words_as_names(monkeypatch: pytest.MonkeyPatch):
    path = ROOT / "splitray" / "not_written.py"
    source = 'SPEC = "route.py"  # the order of route.py, cost.py and planners/exact.py; see splitray.route.Route\n'
    monkeypatch.setattr(Path, "read_text", _with(path, source, Path.read_text))
    assert list(stale(path, equations())) == []
