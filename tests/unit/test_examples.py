"""The programs of examples/ run, and what they print is so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTED = {
    "same_tokens": "equal to transformers: True",
    "move_while_generating": "epoch 1, equal to the run that stayed: True",
    "lose_a_device": "equal to the undisturbed run: True",
    "compare_planners": "CloudWhileThere: ",
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_and_says_so(name: str):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"examples/{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout, done.stdout


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PRINTED)
    assert all(20 <= len(path.read_text().splitlines()) <= 60 for path in (ROOT / "examples").glob("*.py"))
