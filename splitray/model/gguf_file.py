"""A GGUF file, or the parts that it is split into: what it says of its model, and where its tensors lie.

Reads headers; of tensors the bytes that are asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations.gguf import reader as gguf_reader

from splitray.errors import ModelError
from splitray.model.folder import gguf_parts
from splitray.model.weights.gguf_types import Kind, block_of, type_named
from splitray.model.weights.quantised import Bytes

_DAMAGED = (struct.error, ValueError, IndexError, OverflowError, MemoryError, KeyError, TypeError)
_VERSIONS = (2, 3)
_MOST_AXES = 4
_AGAIN = "copy the file again, whole"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`shape` as torch has it, its `data` [rows, bytes of a row] mapped from `file`; a number or vector has one row."""

    file: Path
    kind: Kind
    shape: tuple[int, ...]
    data: Bytes


class GgufFile:
    """Opened: `metadata` of the first part (a list of strings is how many they are), `tensors` of all parts by name."""

    def __init__(self, path: str | Path) -> None:
        """Map a file, or all the parts of which it is one.

        Raises:
            ModelError: no such file, a part is missing, it is no GGUF, ends early, or has types that are not read here.
        """
        self.files = gguf_parts(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for number, file in enumerate(self.files):
            metadata, tensors = _opened(file)
            if number == 0:
                self.metadata = metadata
            for name, tensor in tensors.items():
                if name in self.tensors:
                    raise _damaged(file, f"one tensor {name}", "it twice")
                self.tensors[name] = tensor
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > len(self.files):
            name = f"NAME-00001-of-{parts:05}.gguf"
            raise ModelError(f"GGUF file {self.files[0]}", expected=f"{name} and so on: one of {parts} parts",
                             actual=self.files[0].name, remedy="give the parts such names, in one folder")  # fmt: skip
        counted = self.metadata.get("split.tensors.count")
        if counted is not None and counted != len(self.tensors):
            raise _damaged(self.files[0], f"the {counted} tensors that it counts", f"{len(self.tensors)} in its parts")

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it: llama, qwen3, gpt-oss.

        Raises:
            ModelError: the file does not say it.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise _damaged(self.files[0], "general.architecture", found)
        return found

    def strings(self, *keys: str) -> dict[str, list[str]]:
        """Lists of strings of the metadata, such as a vocabulary, read now; those that there are."""
        metadata = _header(self.files[0], _mapped(self.files[0]), keys)[0]
        return {key: metadata[key] for key in keys if isinstance(metadata.get(key), list)}


def _mapped(file: Path) -> Bytes:
    try:
        return np.memmap(file, mode="r", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise _damaged(file, "a file that can be read", error) from error


def _header(file: Path, blob: Bytes, strings: Collection[str] = ()) -> tuple[dict[str, Any], int, int]:
    """Metadata, how many tensors there are, and where their table begins. Later parts need not name an architecture."""
    if bytes(blob[:4]) != b"GGUF":
        start = bytes(blob[:4])
        actual = "a Git LFS pointer: run `git lfs pull`" if start == b"vers" else f"one that begins with {start!r}"
        raise _damaged(file, "a GGUF file", actual)
    try:
        version, tensors, pairs = struct.unpack_from("<IQQ", blob.data, 4)
        if version not in _VERSIONS:
            raise _damaged(
                file, f"GGUF version {' or '.join(map(str, _VERSIONS))}, little-endian", f"version {version}"
            )
        metadata, at = dict[str, Any](), 24
        for _ in range(pairs):
            key, at = gguf_reader._read_string(blob, at)
            (kind,) = struct.unpack_from("<I", blob.data, at)
            metadata[key], at = gguf_reader._read_value(blob, at + 4, kind, key in strings)
    except ModelError:
        raise
    except _DAMAGED as error:
        raise _damaged(file, "a whole header", f"{len(blob):,} bytes ({error})") from error
    return metadata, tensors, at


def _opened(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    blob = _mapped(file)
    metadata, count, at = _header(file, blob)
    try:
        entries, at = gguf_reader._read_tensor_table(blob, count, at)
    except _DAMAGED as error:
        raise _damaged(file, f"a table of {count} tensors", f"{len(blob):,} bytes ({error})") from error
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise _damaged(file, "general.alignment above 0", step)
    start, tensors = -(-at // step) * step, dict[str, StoredTensor]()
    for name, shape, number, offset in entries:
        kind = type_named(number, file=file, tensor=name)
        weights, size = block_of(kind)
        if len(shape) > _MOST_AXES or name in tensors or (shape and shape[-1] % weights):
            raise _damaged(file, f"one tensor {name} in whole blocks of {weights}", f"shape {list(shape)}")
        rows, row = math.prod(shape[:-1]), (shape[-1] if shape else 1) // weights * size
        end = start + offset + rows * row
        if end > len(blob):
            raise _damaged(file, f"{end:,} bytes or more: tensor {name} ends there", f"{len(blob):,} bytes")
        data = blob[start + offset : end].reshape(rows, row)
        tensors[name] = StoredTensor(file, kind, tuple(shape), data)
    return metadata, tensors


def _damaged(file: Path, expected: str, actual: object) -> ModelError:
    return ModelError(f"GGUF file {file}", expected=expected, actual=actual, remedy=_AGAIN)
