"""Folders for temporary files: gone with their block, and refused where there is no room for Ray."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from splitray.errors import StartFailed
from splitray.scratch import remove_all, scratch_folder

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_folder_is_gone_with_its_block_or_when_all_have_to_go() -> None:
    with scratch_folder() as folder:
        (folder / "file").write_text("text")
    assert not folder.exists()
    with scratch_folder() as folder:
        remove_all()
        assert not folder.exists()


def test_ray_gets_a_short_path_and_is_not_started_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder(for_ray=True) as folder:
        assert len(str(folder)) < 30 < len(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e9, 1e9, 1e6))
    says = "/tmp has 1.0 MB left, and Ray writes 20 MB; make room there"
    with pytest.raises(StartFailed, match=says), scratch_folder(for_ray=True):
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StartFailed, match="No such file.*TMPDIR"), scratch_folder():
        pass
