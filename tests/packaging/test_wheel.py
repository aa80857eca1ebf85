"""The wheel: built from a clean copy without a network, it holds the four packages with their data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("splitray", "actors", "rllib_configs", "serve_apps")
LEFT_OUT = ("__pycache__", "*.pyc", "*.egg-info", ".*")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that a stale build folder or an editable install cannot add to the wheel."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *offline, "-w", str(out), "."],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_four_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert info.startswith("splitray-")
    assert tops - {info} == set(PACKAGES)


def test_every_module_and_data_file_is_inside(tree: Path, wheel: zipfile.ZipFile) -> None:
    """Model files, YAML and pages as well: a package that works only from its source tree is refused."""
    wanted = {
        path.relative_to(tree).as_posix()
        for package in PACKAGES
        for path in (tree / package).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    assert wanted - set(wheel.namelist()) == set()


def test_the_readmes_of_the_folders_stay_out(wheel: zipfile.ZipFile) -> None:
    """They are for whoever reads the repository; what is installed is code, and the data that it opens."""
    assert [name for name in wheel.namelist() if name.endswith("README.md")] == []


def test_the_command_the_licence_and_the_type_marker_are_inside(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "splitray/py.typed" in names
    (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert "splitray = splitray.commands.program:main" in wheel.read(entry_points).decode()
    (licence,) = [name for name in names if name.endswith("/LICENSE")]
    text = wheel.read(licence).decode()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
