"""The README's own blocks run and do what the text says (make targets are what CI itself runs)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitray.commands.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if "bin/splitray " in line
]


@pytest.mark.usefixtures("forked_devices")
def test_the_python_block_runs(capsys):
    (code,) = [text for language, text in BLOCKS if language == "python"]
    exec(code, {"__name__": "__main__"})
    assert "Return a list of" in capsys.readouterr().out


def test_a_splitray_command_runs_as_a_program():
    """One that needs no torch; programs that do are those of tests/unit/test_cli.py."""
    (words,) = [w for w in COMMANDS if w[1] == "plan"]
    program = str(Path(sys.executable).parent / "splitray")
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("forked_devices")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_splitray_command_of_the_readme_runs(words, monkeypatch):
    """In this process, which has read torch and transformers already."""
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output


def test_every_path_that_the_documents_name_exists():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named = re.findall(r"(?:clusters|tests|splitray|actors|serve_apps)/[\w/.-]+\.(?:py|yaml|md)", text)
        for path in named:
            assert (ROOT / path).exists(), f"{document} names {path}"
