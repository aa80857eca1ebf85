"""docs/planner-in-30-lines.md keeps its word: the blocks run as they are, and the planner has at most 30 lines."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitray.commands.cli import app
from splitray.planners.protocol import ClusterState

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "planner-in-30-lines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
FILES = {m[1]: text for _, text in BLOCKS if (m := re.match(r"# (\S+)\n", text))}
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_the_planner_has_at_most_30_lines() -> None:
    code = [line for line in FILES["mine.py"].splitlines()[1:] if line.strip()]
    assert set(FILES) == {"mine.py", "devices.yaml"} and len(code) <= 30, len(code)


@pytest.mark.parametrize("command", COMMANDS, ids=[shlex.split(c)[1] for c in COMMANDS])
def test_a_command_of_the_page_runs(folder: Path, command: str) -> None:
    _, *words = shlex.split(command)
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert "mine:Mine" in result.stdout or "token_ids" in result.stdout


def test_a_mistake_in_it_ends_the_command_with_2(folder: Path) -> None:
    (folder / "mine.py").write_text(FILES["mine.py"].replace("state.arch, ", "state.ark, "))
    for command in COMMANDS[:2]:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 2 and "mine:Mine" in result.output and "AttributeError" in result.output


def test_the_python_block_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [text for language, text in BLOCKS if language == "python" and not text.startswith("# ")]
    sys.path.insert(0, str(folder))  # as for `python FILE` in this folder
    exec(compile(code, "page", "exec"), {})
    assert capsys.readouterr().out.strip() == "('edge0', 'cloud0')"


def test_the_page_names_every_field_of_the_state() -> None:
    fields = {*ClusterState.__dataclass_fields__, "pinned_embedding", "pinned_head"}
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert fields <= named, fields - named
