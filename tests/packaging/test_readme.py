"""The README's own blocks run and do what the text says (make targets are what CI itself runs)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_runs():
    (code,) = [text for language, text in BLOCKS if language == "python"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Return a list of" in done.stdout


@pytest.mark.parametrize(
    "command",
    [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if "bin/splitray " in line],
)
def test_a_splitray_command_of_the_readme_runs(command):
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).parent / "splitray")
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_path_that_the_documents_name_exists():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named = re.findall(r"(?:clusters|tests|splitray|actors|serve_apps)/[\w/.-]+\.(?:py|yaml|md)", text)
        for path in named:
            assert (ROOT / path).exists(), f"{document} names {path}"
