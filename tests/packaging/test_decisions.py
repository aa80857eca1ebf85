"""Decisions: one file each with its day, its reasons and its cost, all of them in the list."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "decisions"
FILES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_decision_has_its_day_its_reasons_and_its_cost(path: Path):
    day, _, name = path.stem[:10], path.stem[10], path.stem[11:]
    assert datetime.date.fromisoformat(day) and re.fullmatch(r"[a-z0-9-]+", name)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.findall(r"\*\*(Situation|Decision|Why|Cost)\.\*\* \S", text) == ["Situation", "Decision", "Why", "Cost"]


def test_the_list_has_every_decision_once_by_date():
    rows = re.findall(r"^\| (\S+) \| \[(.*)\]\((.*)\) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    titles = [path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for path in FILES]
    assert rows == [(path.name[:10], title, path.name) for path, title in zip(FILES, titles, strict=True)]


def test_one_page_holds_the_whole():
    assert len((FOLDER.parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 100
