"""Self-tests that passed, kept on this user's disk: a config is tested once, and not by every command.

What is kept holds for the same config, code and libraries on the same kind of processor. A folder that
cannot be read or written, and a file that is damaged, cost another test and nothing else.
"""

import contextlib
import hashlib
import json
import os
import platform
from functools import cache
from pathlib import Path

import numpy
import torch
import transformers
from transformers import PretrainedConfig

from splitray.errors import InputError
from splitray.own_code import code_hash
from splitray.results import write_whole
from splitray.runtime.selftest import self_test
from splitray.user_file import UserFile

VARIABLE = "SPLITRAY_CACHE"
"""Names the folder instead of `~/.cache/splitray` (or that of XDG_CACHE_HOME); empty: nothing is kept."""
_MOST = 500  # outcomes; each has some 40 bytes


def lean_is_exact(config: PretrainedConfig) -> bool:
    """What `self_test` says of a config, from an earlier run if there was one.

    Raises:
        ModelError: see `self_test`; what is refused is tested again the next time.
    """
    folder = cache_folder()
    if folder is None:
        return self_test(config)
    path = folder / "selftest" / f"{_key(config)}.json"
    lean = _read(path)
    if lean is None:
        lean = self_test(config)
        _write(path, lean)
    return lean


def cache_folder() -> Path | None:
    """Where outcomes are kept; None if the user wants none kept, or has no home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitray"
    return None


def _key(config: PretrainedConfig) -> str:
    about = [config.to_json_string(), type(config).__name__, _surroundings()]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]


@cache
def _surroundings() -> str:
    """All that an outcome depends on beside the config: this package's code to the letter, and what runs it."""
    versions = [torch.__version__, transformers.__version__, numpy.__version__, platform.python_version()]
    return "\n".join(
        [code_hash(Path(__file__).parents[1]), *versions, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    )


def _read(path: Path) -> bool | None:
    try:
        kept = UserFile(path, "self-test", "delete it").json()
    except InputError:
        return None
    lean = kept.get("lean") if isinstance(kept, dict) else None
    return lean if isinstance(lean, bool) else None


def _write(path: Path, lean: bool) -> None:
    """Whole or not at all, whoever writes at the same time; the oldest go where there are too many."""
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps({"lean": lean}))
        kept = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in kept[:-_MOST]:
            old.unlink()
