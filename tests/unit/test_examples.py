"""The programs of examples/ run, and what they print is so."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTED = {
    "same_tokens": "equal to transformers: True",
    "move_while_generating": "epoch 1, equal to the run that stayed: True",
    "lose_a_device": "equal to the undisturbed run: True",
    "compare_planners": "CloudWhileThere: ",
}


@pytest.mark.usefixtures("forked_devices")
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """In this process, which has read torch and transformers already."""
    monkeypatch.chdir(ROOT)
    runpy.run_path(f"examples/{name}.py", run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PRINTED)
    assert all(20 <= len(path.read_text().splitlines()) <= 60 for path in (ROOT / "examples").glob("*.py"))
