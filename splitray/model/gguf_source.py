"""Weights of a GGUF file, read slice by slice under transformers' names."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32
from splitray.errors import ModelError
from splitray.model.gguf_file import GgufFile, StoredTensor
from splitray.model.gguf_names import Names
from splitray.model.weights.gguf_types import PLAIN, Kind, block_of, floats, quantised
from splitray.model.weights.quantised import Bytes, Quantised, beside

_SAMPLE_BYTES = 64  # of every tensor, for the fingerprint
_FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q2_K, Kind.Q3_K)
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


class GgufSource:
    """Slices of a GGUF file's tensors; `bytes_read` counts what was taken from it, in its own form."""

    def __init__(self, path: str | Path) -> None:
        """Open headers: of a file, of all parts of a split one, or of the one model in a folder.

        Raises:
            ModelError: the file or one of its parts cannot be read, or is of a family that is not read here.
        """
        self.file = GgufFile(path)
        self.bytes_read = 0
        architecture = self.file.architecture
        heads, kv_heads = (self._count(f"attention.head_count{end}") for end in ("", "_kv"))
        self.names = Names(architecture, self._count("block_count"), heads, kv_heads or heads)
        self.names.stored(_TABLE)  # refuses other families

    def key(self, name: str) -> str | None:
        """The file's name of a parameter, the first one of several; None if the file does not have it.

        A head that is not stored is the embedding.
        """
        if (several := self.names.experts(name)) is not None:
            return several[0] if all(n in self.file.tensors for n in several) else None
        found = self.names.stored(name)
        if name == _HEAD and found not in self.file.tensors:
            found = self.names.stored(_TABLE)
        return found if found in self.file.tensors else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, as transformers has it."""
        if (several := self.names.experts(name)) is None:
            return self._stored(name).shape
        self._stored(name)
        experts, *rest = self.file.tensors[several[0]].shape
        if rest:
            rest[0] *= len(several)
        return (experts, *(reversed(rest) if self._is_transposed else rest))

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """Read a parameter, or ranges of it along one axis (0 or 1), joined in order.

        Returns:
            A tensor that owns its memory: plain floats in the file's type, blocks as float32.

        Raises:
            ModelError: the file has no such parameter.
        """
        if (several := self.names.experts(name)) is not None:
            return self._stacked(name, several, axis, ranges)
        stored = self._stored(name)
        if ranges is None:
            ranges = [Range(0, stored.shape[axis] if stored.shape else 1)]
        if len(stored.shape) < 2:
            found = self._floats(stored, stored.data)
            found = torch.cat([found.reshape(-1)[torch.from_numpy(self._places(name, r))] for r in ranges])
        elif axis == 0:
            found = self._floats(stored, stored.data[np.concatenate([self._places(name, r) for r in ranges])])
        else:
            found = torch.cat([self._columns(name, stored, r) for r in ranges], dim=1)
        if self.names.is_lifted(name):
            found = found.float() - 1
        return found

    def read_quantised(
        self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None
    ) -> tuple[Quantised, Floats32 | None] | None:
        """As `read`, a matrix in whole numbers: (matrix, minima [O, G] of its groups or None for none).

        Returns:
            None for plain floats, and where a range of columns ends within a group.
        """
        stored = self._stored(name)
        if stored.kind in PLAIN or len(stored.shape) != 2:
            return None
        ranges = [Range(0, stored.shape[axis])] if ranges is None else ranges
        if axis == 0:
            rows = stored.data[np.concatenate([self._places(name, r) for r in ranges])]
            self.bytes_read += rows.nbytes
            return quantised(rows, stored.kind)
        order = self._places(name, Range(0, stored.shape[0]))
        parts = []
        for r in ranges:
            raw, start = self._blocks(stored, r)
            made = quantised(raw[order], stored.kind)
            assert made is not None, "blocks"
            cut = _groups(*made, Range(r.start - start, r.stop - start))
            if cut is None:
                return None
            parts.append(cut)
        matrices = [m for m, _ in parts]
        minima = [m for _, m in parts if m is not None]
        return beside(matrices), np.concatenate(minima, axis=1) if minima else None

    def read_experts(self, module: str, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fused (gate_up [E, 2f, d], down [E, d, f]) of some experts."""
        ranges = [Range(e, e + 1) for e in experts]
        return self.read(f"{module}.gate_up_proj", ranges=ranges), self.read(f"{module}.down_proj", ranges=ranges)

    def stored_format(self) -> str:
        """The format (weight_formats.py) that is nearest to most of the stored numbers."""
        counts = Counter[Kind]()
        for tensor in self.file.tensors.values():
            counts[tensor.kind] += math.prod(tensor.shape)
        (most, _), *_ = counts.most_common(1) or [(Kind.F32, 0)]
        return PLAIN.get(most) or ("int4" if most in _FOUR_BITS else "int8")

    def fingerprint(self) -> str:
        """Hash of metadata, names, shapes, types and a sample of every tensor: equal on all copies of a model."""
        digest = hashlib.sha256(repr(sorted(self.file.metadata.items())).encode())
        for name, tensor in sorted(self.file.tensors.items()):
            data = tensor.data.reshape(-1)
            at = max(0, (len(data) - _SAMPLE_BYTES) // 2)
            digest.update(
                f"{name} {tensor.kind.name} {tensor.shape}".encode() + data[at : at + _SAMPLE_BYTES].tobytes()
            )
        return digest.hexdigest()[:16]

    @property
    def _is_transposed(self) -> bool:
        """Whether the family multiplies by experts from the right, gate and up in turn."""
        return self.names.architecture == "gpt-oss"

    def _stacked(self, name: str, several: Sequence[str], axis: int, ranges: Sequence[Range] | None) -> Tensor:
        self._stored(name)
        tensors = [self.file.tensors[n] for n in several]
        first = tensors[0]
        experts = [Range(0, first.shape[0])] if ranges is None or axis != 0 else ranges
        parts = []
        for stored in tensors:
            per_expert = math.prod(stored.shape[1:-1])
            rows = np.concatenate([np.arange(r.start * per_expert, r.stop * per_expert) for r in experts])
            parts.append(self._floats(stored, stored.data[rows]).reshape(-1, *stored.shape[1:]))
        if self._is_transposed:
            found = parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)
            found = found.transpose(1, 2) if found.ndim == 3 else found
        else:
            found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if ranges is not None and axis != 0:
            found = torch.cat([found.narrow(axis, r.start, r.count) for r in ranges], dim=axis)
        return found.contiguous()

    def _columns(self, name: str, stored: StoredTensor, r: Range) -> Tensor:
        raw, start = self._blocks(stored, r)
        found = self._floats(stored, raw[self._places(name, Range(0, stored.shape[0]))], counted=True)
        return found[:, r.start - start : r.stop - start]

    def _blocks(self, stored: StoredTensor, r: Range) -> tuple[Bytes, int]:
        """The blocks that hold some columns, and the first column in them."""
        weights, size = block_of(stored.kind)
        first, last = r.start // weights, -(-r.stop // weights)
        raw = stored.data[:, first * size : last * size]
        self.bytes_read += raw.nbytes
        return raw, first * weights

    def _places(self, name: str, r: Range) -> np.ndarray:
        stored = self._stored(name)
        order = self.names.order(name, stored.shape[0]) if stored.shape else None
        return np.arange(r.start, r.stop) if order is None else order[r.start : r.stop]

    def _floats(self, stored: StoredTensor, raw: Bytes, *, counted: bool = False) -> Tensor:
        if not counted:
            self.bytes_read += raw.nbytes
        if stored.kind in PLAIN:
            own = torch.from_numpy(np.array(raw, copy=True, order="C"))
            found = own.view(getattr(torch, PLAIN[stored.kind]))
        else:
            found = torch.from_numpy(floats(raw, stored.kind))
        return found.reshape(stored.shape) if len(stored.shape) < 2 else found

    def _stored(self, name: str) -> StoredTensor:
        key = self.key(name)
        if key is None:
            actual = f"{len(self.file.tensors)} others"
            raise ModelError(f"GGUF file {self.file.files[0]}", expected=f"a tensor for {name}", actual=actual,
                             remedy="copy the file again, whole")  # fmt: skip
        return self.file.tensors[key]

    def _count(self, key: str) -> int:
        value = self.file.metadata.get(f"{self.file.architecture}.{key}", 0)
        if not isinstance(value, int) or not 0 <= value <= 100_000:
            raise ModelError(f"GGUF file {self.file.files[0]}: {self.file.architecture}.{key}", expected="a number",
                             actual=value, remedy="use a model whose layers are alike")  # fmt: skip
        return value


def _groups(matrix: Quantised, minima: Floats32 | None, r: Range) -> tuple[Quantised, Floats32 | None] | None:
    """Columns of a matrix; None where they end within a group."""
    if r.start % matrix.group or r.stop % matrix.group:
        return None
    a, b = r.start // matrix.group, r.stop // matrix.group
    zeros = None if matrix.zeros is None else np.zeros((matrix.outputs, -(-(b - a) // 2)), np.uint8)
    cut = Quantised(bits=matrix.bits, group=matrix.group, numbers=np.ascontiguousarray(matrix.numbers[:, a:b]),
                    scales=np.ascontiguousarray(matrix.scales[:, a:b]), zeros=zeros, inputs=r.count)  # fmt: skip
    return cut, None if minima is None else minima[:, a:b]
