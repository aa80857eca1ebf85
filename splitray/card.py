"""A small network on disk: `NAME.safetensors`, and the card `NAME.json`, which has the other's SHA-256.

Knows no network.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from splitray.user_file import UserFile


def read_card(file: UserFile, tensors_at: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The card's document and the tensors of the file beside it, as float32 values that are finite.

    Raises:
        InputError: one of both is missing or damaged, or they do not belong together.
    """
    card = file.json()
    beside = replace(file, path=tensors_at)
    raw = beside.raw()
    if not isinstance(card, dict):
        raise file.wrong("a JSON object", type(card).__name__)
    if card.get("sha256") != (found := hashlib.sha256(raw).hexdigest()):
        raise file.wrong(f"sha256 {found}, the SHA-256 of {tensors_at.name}", card.get("sha256"))
    try:
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in load(raw).items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise beside.wrong("a whole safetensors file of numbers", error) from error
    if wrong := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise beside.wrong("finite values", f"others in {wrong[0]}")
    return card, tensors


def chained(layers: tuple[tuple[NDArray, NDArray], ...], inputs: int | None = None) -> bool:
    """Whether layers of (weight [in, out], bias [out]) fit behind each other, and behind so many inputs."""
    for weight, bias in layers:
        if weight.ndim != 2 or bias.shape != weight.shape[1:] or weight.shape[0] != (inputs or weight.shape[0]):
            return False
        inputs = weight.shape[1]
    return bool(layers)
