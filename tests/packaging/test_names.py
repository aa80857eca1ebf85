"""One name for one thing: no two public classes of the product share a name, so that a reader can search for one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("splitray", "actors", "serve_apps", "rllib_configs")


def classes() -> dict[str, list[str]]:
    """Where each public class stands, by its name; classes inside functions are nobody else's."""
    found = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_two_public_classes_share_a_name() -> None:
    found = classes()
    assert "Placement" in found
    assert {name: at for name, at in found.items() if len(at) > 1} == {}
