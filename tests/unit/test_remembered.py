"""Self-tests that passed are kept on disk: one test for a config, and nothing that is wrong with the disk stops it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import family_config, save_family

from splitray.errors import ModelError, unsplittable
from splitray.model.reading import read_config
from splitray.runtime import remembered
from splitray.runtime.launch import read_model
from splitray.runtime.remembered import lean_is_exact


@pytest.fixture
def tests_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The families that were really tested; an outcome is what the environment says."""
    run: list[str] = []

    def self_test(config):
        run.append(config.model_type)
        return bool(int(os.environ["LEAN"]))

    monkeypatch.setattr(remembered, "self_test", self_test)
    monkeypatch.setattr(remembered, "_surroundings", remembered._surroundings.__wrapped__)  # asked anew each time
    monkeypatch.setenv("LEAN", "1")
    monkeypatch.setenv(remembered.VARIABLE, str(tmp_path / "cache"))
    return run


def test_a_config_is_tested_once(tests_run, monkeypatch):
    config = family_config("llama")
    assert lean_is_exact(config) and lean_is_exact(config)
    assert tests_run == ["llama"]
    monkeypatch.setenv("LEAN", "0")
    assert not lean_is_exact(family_config("gpt2")) and not lean_is_exact(family_config("gpt2"))
    assert tests_run == ["llama", "gpt2"]
    assert lean_is_exact(config), "the other config has changed nothing"


def test_a_model_that_is_copied_is_the_same_config(tests_run, tmp_path):
    for folder in ("a", "b"):
        save_family("llama", tmp_path / folder)
        assert read_model(tmp_path / folder)[2]
    assert tests_run == ["llama"]
    config = read_config(tmp_path / "a")
    config.rms_norm_eps *= 2
    lean_is_exact(config)
    assert tests_run == ["llama"] * 2


@pytest.mark.parametrize("what", ["code", "versions"])
def test_other_code_and_other_libraries_are_tested_again(tests_run, monkeypatch, what):
    lean_is_exact(family_config("llama"))
    if what == "versions":
        monkeypatch.setattr(remembered, "transformers", SimpleNamespace(__version__="6.0"))
    else:
        monkeypatch.setattr(remembered, "__file__", __file__)  # the package is another folder
    lean_is_exact(family_config("llama"))
    assert tests_run == ["llama"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"lean": "yes"}', '{"other": 1}', "\x00\xff"])
def test_a_damaged_outcome_is_tested_again_and_mended(tests_run, tmp_path, content):
    lean_is_exact(family_config("llama"))
    (file,) = (tmp_path / "cache" / "selftest").iterdir()
    file.write_bytes(content.encode("latin-1"))
    assert lean_is_exact(family_config("llama")) and lean_is_exact(family_config("llama"))
    assert tests_run == ["llama"] * 2


@pytest.mark.parametrize("place", ["a file", "a folder in place of the outcome", "nowhere"])
def test_a_folder_that_cannot_be_used_costs_a_test_and_no_error(tests_run, tmp_path, monkeypatch, place):
    if place == "a folder in place of the outcome":
        lean_is_exact(family_config("llama"))
        (file,) = (tmp_path / "cache" / "selftest").iterdir()
        file.unlink()
        file.mkdir()
    elif place == "a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setenv(remembered.VARIABLE, "/proc/none/such")
    tests_run.clear()
    assert lean_is_exact(family_config("llama")) and lean_is_exact(family_config("llama"))
    assert tests_run == ["llama"] * 2


def test_nothing_is_kept_of_what_is_refused(tests_run, tmp_path, monkeypatch):
    def refuse(config):
        raise unsplittable("architecture", "a", "b")

    monkeypatch.setattr(remembered, "self_test", refuse)
    for _ in range(2):
        with pytest.raises(ModelError):
            lean_is_exact(family_config("llama"))
    assert not (tmp_path / "cache").exists()


def test_the_oldest_outcomes_go(tests_run, tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 3)
    for i in range(6):
        config = family_config("llama")
        config.rms_norm_eps = 1e-5 * (i + 1)
        lean_is_exact(config)
        (file,) = set((tmp_path / "cache" / "selftest").iterdir()) - {f for f, _ in kept(tmp_path)[:-1]}
        os.utime(file, (i, i))
    assert len(kept(tmp_path)) == 3
    assert [t for _, t in kept(tmp_path)] == [3, 4, 5]


def kept(tmp_path):
    return sorted(((f, f.stat().st_mtime) for f in (tmp_path / "cache" / "selftest").iterdir()), key=lambda x: x[1])


def test_the_folder_is_the_users_and_can_be_moved_and_left_out(monkeypatch, tmp_path):
    monkeypatch.delenv(remembered.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.cache_folder() == tmp_path / "splitray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered.cache_folder() == tmp_path / ".cache" / "splitray"
    monkeypatch.setenv(remembered.VARIABLE, "~/there")
    assert remembered.cache_folder() == tmp_path / "there"
    monkeypatch.setenv(remembered.VARIABLE, "")
    assert remembered.cache_folder() is None
