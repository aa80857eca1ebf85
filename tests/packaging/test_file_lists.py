"""Each folder's README lists the folder's files, each once, in the words of the files themselves."""

from __future__ import annotations

from pathlib import Path

import file_lists as lists
import pytest

REMEDY = "run `python tests/packaging/file_lists.py` (or `make format`), and give a new file a docstring"


@pytest.mark.parametrize("folder", lists.folders(), ids=lambda folder: str(folder.relative_to(lists.ROOT)))
def test_a_readme_lists_every_file_of_its_folder_once_and_nothing_else(folder: Path):
    rows = lists.rows_of((folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(lists.wanted(folder).items()), REMEDY


@pytest.mark.parametrize("folder", lists.folders(), ids=lambda folder: str(folder.relative_to(lists.ROOT)))
def test_every_file_says_in_its_first_sentence_what_it_is(folder: Path):
    assert all(lists.wanted(folder).values()), f"{folder} has a file without a docstring"


def test_a_list_keeps_its_order_and_loses_what_is_gone():
    text = f"# room\n\nIntro.\n\n{lists.HEADER}| `b.py` | old words |\n| `gone.py` | x |\n| `a.py` | y |\n\nMore.\n"
    new = lists.rewritten(text, {"a.py": "A.", "b.py": "B.", "c.py": "C."})
    assert lists.rows_of(new) == [("b.py", "B."), ("a.py", "A."), ("c.py", "C.")]
    assert new.startswith("# room\n\nIntro.\n") and new.endswith("\n\nMore.\n")
