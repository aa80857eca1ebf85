"""Where weights come from: safetensors checkpoints, one file or indexed, read slice by slice and counted.

Knows names, shapes and bytes; not which device wants what, nor what the tensors mean.
"""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.config import text_part, whole_config
from splitray.model.folder import config_values, model_folder, weight_files
from splitray.model.stored_names import Made, StoredNames, stored_names
from splitray.model.surgery import meta_model
from splitray.model.weights.quantised import Quantised
from splitray.weight_formats import StoredWeights

_SAMPLE_BYTES = 64  # of every tensor, for the fingerprint: a changed fine-tune shows, a big file is not read
_EXPERTS = (  # (container, gate, up, down) of one expert in checkpoints that do not fuse them
    ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ("mlp.experts", "w1", "w3", "w2"),
    ("block_sparse_moe.experts", "w1", "w3", "w2"),
)
_MOST_COMPARED = 2**28  # values: more take seconds, and to hold two equal tables costs memory only


class Checkpoint:
    """A model folder opened for lazy reading; `bytes_read` counts what was really taken from it."""

    def __init__(self, folder: str | Path) -> None:
        """Open the folder's safetensors headers.

        Raises:
            ModelError: no config or weights there, an adapter beside them, or a file is missing, truncated or no
                safetensors file.
        """
        self.folder = model_folder(folder)
        self.bytes_read = 0
        named = config_values(folder).get("transformers_weights")
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._last: tuple[Made, dict[str, Tensor]] | None = None
        for name in weight_files(self.folder, named):
            path = self.folder / name
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _damaged(f"weights {name}", "a complete safetensors file", error) from error
            self._files[name] = opened
            for key in opened.keys():  # noqa: SIM118 - safe_open is no dict
                self._file_of[key] = name

    @cached_property
    def names(self) -> StoredNames:
        """Which stored tensor is which parameter, as transformers decides it.

        Raises:
            ModelError: the config is none of a text decoder.
        """
        whole = whole_config(self.folder)
        return stored_names(whole, meta_model(text_part(whole), torch.float32), self.shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every stored tensor."""
        return {k: tuple(self._slice(k).get_shape()) for k in self._file_of}

    def file_of(self, key: str) -> str:
        """The file that a stored tensor is in."""
        return self._file_of[key]

    def type_of(self, key: str) -> str:
        """The type of a stored tensor, as safetensors calls it: F32, BF16."""
        return str(self._slice(key).get_dtype())

    def stored(self) -> StoredWeights:
        """The format of most of the stored numbers; float32 where it has no name."""
        counts = Counter[str]()
        for key in self._file_of:
            counts[self.type_of(key)] += math.prod(self._slice(key).get_shape())
        (most, _), *_ = counts.most_common(1) or [("F32", 0)]
        return StoredWeights({"BF16": "bfloat16", "F16": "float16"}.get(most, "float32"))

    def inexact(self) -> list[str]:
        """Names of layers' matrices that `read_quantised` does not give, where it gives some."""
        return []

    def config_text(self) -> str:
        """The model's config, as JSON."""
        return (self.folder / "config.json").read_text(encoding="utf-8")

    def key(self, name: str) -> str | None:
        """The checkpoint's key for a parameter of the model, or None."""
        return name if name in self._file_of else self.names.keys.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a parameter."""
        return tuple(self._slice(self._required(name)).get_shape())

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """Read a tensor, or ranges of it along one axis (0 or 1), joined in order.

        Returns:
            A tensor that owns its memory, in the checkpoint's dtype.
        """
        if not self._is_stored_as_read(name) and name in self.names.made:
            return self._made(name, axis, ranges)
        view = self._slice(self._required(name))
        if ranges is None:
            parts = [view[:] if view.get_shape() else self._number(self._required(name))]
        elif axis == 0:
            parts = [view[r.start : r.stop] for r in ranges]
        else:
            parts = [view[:, r.start : r.stop] for r in ranges]
        self.bytes_read += sum(p.numel() * p.element_size() for p in parts)
        if len(parts) > 1:
            return torch.cat(parts, dim=axis)
        # a slice may be a view of the mapped file, strided along axis 1: own it, or every token pays for that
        return parts[0].clone(memory_format=torch.contiguous_format)

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """The whole numbers that are stored of a matrix: here none."""
        return None

    def read_experts(self, name: str, experts: Sequence[int]) -> Tensor:
        """Some experts of a stacked weight (gate_up [E, 2f, d] or down [E, d, f]), which may be stored one by one."""
        if self.key(name) is None and all(parts := [self._of_expert(name, e) for e in experts]):
            return torch.stack([torch.cat([self.read(n) for n in names]) for names in parts])
        return self.read(name, ranges=[Range(e, e + 1) for e in experts])

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """The whole numbers that are stored of one: here none."""
        return None

    def _of_expert(self, name: str, expert: int) -> list[str]:
        """The matrices of one expert where each is stored apart: of gate and up, or of down; none if they are not."""
        layer, _, part = name.partition("mlp.experts.")
        for container, gate, up, down in _EXPERTS:
            prefix = f"{layer}{container}.{expert}."
            if self.key(f"{prefix}{gate}.weight") is not None:
                return [f"{prefix}{n}.weight" for n in ((gate, up) if part == "gate_up_proj" else (down,))]
        return []

    def _is_stored_as_read(self, name: str) -> bool:
        """Whether a matrix or vector of this name is there: names of stacked ones may hide another order of axes."""
        return name in self._file_of and len(self._slice(name).get_shape()) < 3

    def _made(self, name: str, axis: int, ranges: Sequence[Range] | None) -> Tensor:
        """Read all that a parameter is made of, and make it; what is made of the same is kept for the next call."""
        made = self.names.made[name]
        if self._last is None or self._last[0] is not made:
            self._last = made, made.make(lambda key: self.read(key))
        tensor = self._last[1][name]
        if ranges is None:
            return tensor.clone(memory_format=torch.contiguous_format)
        return torch.cat([tensor.narrow(axis, r.start, r.count) for r in ranges], dim=axis)

    def equal(self, key: str, other: str) -> bool:
        """Whether two stored tensors have the same values; True is said only of what was compared to the end."""
        a, b = self._slice(key), self._slice(other)
        rows, columns = a.get_shape()
        if rows * columns > _MOST_COMPARED:
            return False
        return all(torch.equal(a[i : i + 1024], b[i : i + 1024]) for i in range(0, rows, 1024))

    def fingerprint(self) -> str:
        """Hash of config, names, shapes, dtypes and a sample of every tensor: equal on all copies of a model."""
        digest = hashlib.sha256()
        for key in sorted(self._file_of):
            view = self._slice(key)
            digest.update(f"{key} {view.get_dtype()} {view.get_shape()}".encode())
        for name in sorted(self._files):
            with open(self.folder / name, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                for key in sorted(k for k in header if k != "__metadata__"):
                    start, stop = header[key]["data_offsets"]
                    file.seek(8 + size + start + max(0, (stop - start) // 2 - _SAMPLE_BYTES // 2))
                    digest.update(key.encode() + file.read(min(_SAMPLE_BYTES, stop - start)))
        return digest.hexdigest()[:16]

    def _number(self, key: str) -> Any:
        """A tensor without axes, which has no slices."""
        return self._files[self._file_of[key]].get_tensor(key)

    def _slice(self, key: str) -> Any:
        return self._files[self._file_of[key]].get_slice(key)

    def _required(self, name: str) -> str:
        key = self.key(name)
        if key is None:
            raise self._missing(name)
        return key

    def _missing(self, name: str) -> ModelError:
        return _damaged(f"weights in {self.folder}", f"a tensor {name}", f"{len(self._file_of)} others")


def _damaged(what: str, expected: str, actual: object) -> ModelError:
    return ModelError(what, expected=expected, actual=actual, remedy="copy the checkpoint again")
