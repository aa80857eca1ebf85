"""Folders and files of results: tried before the work, held by one run at a time, written whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from splitray.commands.cli import app
from splitray.errors import InputError
from splitray.evaluate import gaps
from splitray.evaluate.options import Options, shared_out
from splitray.results import RECORD, result_file, result_folder, try_file, write_whole
from splitray.unfinished import Unfinished, unfinished

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import resource, sys
from pathlib import Path
from splitray.results import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_whole(Path(sys.argv[1]), bytes(10_000))
except OSError as error:
    print(type(error).__name__, error.strerror)
"""


def bad_places(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("kept")
    return {
        "a file in the way": f"{folder}/file/out",
        "a name that is too long": f"{folder}/{'n' * 300}",
        "a file system that takes no files": "/proc/out",
        "a NUL": f"{folder}/a\0b",
    }


KINDS = (
    "a file in the way", "a name that is too long", "a file system that takes no files", "a NUL",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_refused(kind: str, tmp_path: Path) -> None:
    place = Path(bad_places(tmp_path)[kind])
    with pytest.raises(InputError, match="--out: expected a file that can be written"):
        try_file(place)
    with pytest.raises(InputError, match="--out: expected a folder that can be written"), result_folder(place):
        pass
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.glob(".*"))


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "results.json")
    for place in (tmp_path / "a" / "b" / "results.json", tmp_path / "link"):
        with result_file(place):
            assert place.resolve().parent.is_dir()
            write_whole(place, "{}")
        assert place.read_text() == "{}"
    assert write_whole(tmp_path / "e" / "f" / "card.json", "{}").read_text() == "{}"
    with result_folder(tmp_path / "c" / "d"):
        assert (tmp_path / "c" / "d").is_dir()


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="Is a directory"):
        try_file(tmp_path)
    with pytest.raises(InputError, match="File exists"), result_folder(tmp_path / "file"):
        pass


TOPOLOGY = str(ROOT / "clusters" / "topology-edge-cloud.yaml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "llama-7b", "--topology", TOPOLOGY, "--planner", "exact"],
        ["simulate", "--model", "llama-7b", "--topology", TOPOLOGY, "--slots", "1000000"],
        ["evaluate"], ["bench"], ["bench", "--suite", "families"], ["demo"], ["profile"],
        ["perplexity", "--model", "tiny", "--text", "README.md", "--cut", "all", "--codec", "int8"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)  # fmt: skip
def test_each_command_refuses_it_before_it_works(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2, result.output
    assert "out: expected" in " ".join(result.output.split())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")
    path.chmod(0o640)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "OSError File too large\n"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert write_whole(path, b"new") == path
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)


def test_what_a_link_names_is_written_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    write_whole("/dev/null", "text")
    try_file("/dev/null")
    with pytest.raises(OSError, match="No space left"):
        write_whole("/dev/full", "text")


def test_a_folder_and_a_file_belong_to_one_run_at_a_time(tmp_path: Path) -> None:
    with result_folder(tmp_path / "out"), pytest.raises(InputError, match="another run is writing .*wait for it"):
        ExitStack().enter_context(result_folder(tmp_path / "out"))
    with result_folder(tmp_path / "out"):
        pass
    with result_file(tmp_path / "table"), pytest.raises(InputError, match="another run is writing"):
        ExitStack().enter_context(result_file(tmp_path / "table"))
    with result_file(tmp_path / "table"), result_file(tmp_path / "other"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_dead_run_keeps_no_lock(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from splitray.results import result_folder, result_file\n"
    code += "with result_folder(Path(sys.argv[1])), result_file(sys.argv[1] + '/f'):\n"
    code += "    print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"in\n"
        with pytest.raises(InputError, match="another run"):
            ExitStack().enter_context(result_folder(tmp_path))
        run.send_signal(signal.SIGKILL)
    with result_folder(tmp_path), result_file(tmp_path / "f"):
        pass


def test_results_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    with result_folder(tmp_path, {"command": "simulate", "seed": 0, "where": Path("a")}):
        pass
    with result_folder(tmp_path, {"command": "simulate", "seed": 0, "where": Path("a")}):
        pass
    with pytest.raises(InputError, match="a folder for seed 1, got .* has the results of seed 0; give another folder"):
        ExitStack().enter_context(result_folder(tmp_path, {"command": "simulate", "seed": 1, "where": Path("a")}))
    (tmp_path / RECORD).write_bytes(b"\xff{")
    with result_folder(tmp_path, {"command": "simulate"}):
        assert json.loads((tmp_path / RECORD).read_text()) == {"command": "simulate"}


def test_cells_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    path, worked = tmp_path / "unfinished.pickle", []

    def cell(name: str) -> str:
        worked.append(name)
        return name * 2

    def run(*names: str, ends: bool) -> list[str]:
        with unfinished(path) as done:
            found = [done.of(n, lambda n=n: cell(n)) for n in names]  # type: ignore[misc]
            if not ends:
                raise KeyboardInterrupt
            return found

    with pytest.raises(KeyboardInterrupt):
        run("a", "b", ends=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # killed while it wrote
    assert run("a", "b", "c", ends=True) == ["aa", "bb", "cc"]
    assert worked == ["a", "b", "b", "c"] and not path.exists()
    for left in (b"", b"garbage", whole[:5], whole[5:]):
        path.write_bytes(left)
        assert run("a", ends=True) == ["aa"]
    assert worked == ["a", "b", "b", "c", "a", "a", "a", "a"]


def test_what_other_code_has_found_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unfinished.pickle"
    with pytest.raises(KeyError), unfinished(path) as done:
        assert done.of("a", lambda: 1) == 1
        raise KeyError
    monkeypatch.setattr("splitray.unfinished.code_hash", lambda: "other")
    with unfinished(path) as done:
        assert done.of("a", lambda: 2) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_shared_work_goes_on_in_the_order_of_the_jobs(workers: int) -> None:
    done = Unfinished()
    done._done = {"-2": "kept"}
    found = shared_out(abs, [-1, -2, -3], Options(workers=workers, done=done), str)
    assert list(found) == [1, "kept", 3]


def test_a_suite_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(holds: str, planners: Sequence[str], *, first: int) -> tuple[dict[str, list[float]], ...]:
        calls.append(holds)
        if len(calls) == 2:
            raise MemoryError
        rng = np.random.default_rng([first, len(holds)])
        return tuple({p: rng.random(3).tolist() for p in planners} for _ in range(2))

    monkeypatch.setattr(gaps, "gaps", counted)
    arguments = ["evaluate", "--suite", "gaps", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert {p.name for p in tmp_path.iterdir()} == {RECORD, "unfinished.pickle"}
    other = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert other.exit_code == 2 and "has the results of seed 0" in " ".join(other.output.split())
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls == ["none", "embedding_and_head", "embedding_and_head"]
    assert {p.name for p in tmp_path.iterdir()} == {RECORD, "report.json", "report.md", "report.html"}
    at_once = tmp_path / "at_once"
    assert CliRunner().invoke(app, [*arguments[:-1], str(at_once)]).exit_code == 0
    resumed, whole = (json.loads((p / "report.json").read_text())["tables"] for p in (tmp_path, at_once))
    assert resumed == whole
