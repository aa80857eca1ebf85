"""Files of benchmarks/ are documents of `splitray bench`, named by day and machine; its README explains every suite."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from splitray.commands.bench import SUITES

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAME = re.compile(r"\d{4}-\d{2}-\d{2}_[a-z0-9-]+\.json")
ROW = re.compile(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", re.M)
README = (FOLDER / "README.md").read_text(encoding="utf-8")
KEYS = {suite: set(re.findall(r"`(\w+)`", keys)) for suite, keys in ROW.findall(README)}


def wrong(name: str, text: str) -> list[str]:
    """What is wrong with a file: its name, or keys that its suite should have."""
    found = [] if NAME.fullmatch(name) else [f"{name}: not YYYY-MM-DD_machine.json"]
    document = json.loads(text)
    suite = document.get("suite")
    if suite not in KEYS:
        return [*found, f"{name}: no suite {suite}"]
    return found + [f"{name}: lacks {key}" for key in sorted(KEYS[suite] - document.keys())]


def test_every_file_has_its_name_and_its_keys():
    assert [w for path in sorted(FOLDER.glob("*.json")) for w in wrong(path.name, path.read_text("utf-8"))] == []


def test_every_file_has_a_line_about_what_changed():
    told = README.split("## What changed")[1]
    assert [path.name for path in FOLDER.glob("*.json") if path.name not in told] == []


def test_the_readme_tells_the_keys_of_every_suite():
    assert set(KEYS) == set(SUITES)
    assert all({"suite", "machine"} <= keys for keys in KEYS.values())


def test_nothing_else_lies_in_the_folder():
    assert [path.name for path in FOLDER.iterdir() if path.suffix != ".json" and path.name != "README.md"] == []


GOOD = json.dumps({"suite": "simulator", "machine": {}, "slots_per_s": {}, "many_devices": []})


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("2026-11-26_epyc.json", GOOD, []),
        ("epyc.json", GOOD, ["epyc.json: not YYYY-MM-DD_machine.json"]),
        ("2026-11-26_a.json", '{"suite": "simulator", "machine": {}, "slots_per_s": {}}', ["lacks many_devices"]),
        ("2026-11-26_a.json", '{"suite": "other"}', ["no suite other"]),
    ],
)
def test_a_wrong_file_is_found(name: str, text: str, told: list[str]):
    found = wrong(name, text)
    assert len(found) == len(told) and all(t in f for t, f in zip(told, found, strict=True))
