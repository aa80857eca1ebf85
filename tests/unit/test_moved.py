"""Modules that moved are found under their old names: the same objects, with a warning."""

from __future__ import annotations

import importlib
import sys

import pytest

from splitray.runtime import _MOVED


@pytest.mark.parametrize("old", _MOVED)
def test_the_old_name_gives_the_same_module_and_a_warning(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=_MOVED[old]):
        module = importlib.import_module(old)
    assert module is importlib.import_module(_MOVED[old])
    assert module.__spec__ is not None and module.__spec__.name == _MOVED[old] == module.__name__
    assert importlib.reload(module) is module


def test_another_name_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("splitray.runtime.nothing")
