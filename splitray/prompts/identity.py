"""What answers follow from: of two runs for which this is equal, one may go on where the other was ended."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitray.model.folder import has_weights
from splitray.model.opened import open_checkpoint
from splitray.prompts.prompts_file import content_hash
from splitray.runtime.launch import model_path
from splitray.topology import Topology
from splitray.user_file import UserFile
from splitray.weight_formats import BEST_WEIGHTS

_TOLD = (".json", ".jinja", ".model", ".txt")  # files of config, tokenizer and chat template
_EXACT = {"dtype": "float32", "sums": "fixed", "codec": "none", "channel": "none"}


def identity(
    file: UserFile, model: str, settings: Mapping[str, Any], topology: Topology, places: Mapping[str, Any]
) -> dict[str, Any]:
    """As a document. `places` say what runs where: they count only where tokens may depend on that.

    Raises:
        InputError: the file cannot be read.
    """
    exact = all(settings[name] == value for name, value in _EXACT.items()) and settings["weights"] != BEST_WEIGHTS
    exact = exact and not any(device.weights for device in topology.devices)
    return {
        "command": "generate --prompts",
        "prompts": content_hash(file)[:16],
        "model": _model_hash(model_path(model)),
        **settings,
        **({} if exact else places),
    }


def _model_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    if has_weights(folder):
        digest.update(open_checkpoint(folder).fingerprint().encode())
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _TOLD and path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
