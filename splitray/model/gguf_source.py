"""Weights of a GGUF file, read slice by slice under transformers' names."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.gguf_config import config_of
from splitray.model.gguf_file import GgufFile, StoredTensor
from splitray.model.gguf_names import Names
from splitray.model.stored_names import StoredNames, plain_in_layers
from splitray.model.surgery import meta_model
from splitray.model.weights.gguf_types import PLAIN, QUANTISED, Kind, block_of, floats, quantised
from splitray.model.weights.quantised import Bytes, Quantised, alike, joined
from splitray.weight_formats import StoredWeights, resident_bits

_SAMPLE_BYTES = 64  # of every tensor, for the fingerprint
_FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q2_K, Kind.Q3_K)
_GROUPS_OF_16 = (Kind.Q2_K, Kind.Q3_K, Kind.Q6_K)
_WITH_MINIMA = (Kind.Q4_1, Kind.Q5_1, Kind.Q2_K, Kind.Q4_K, Kind.Q5_K)
_IN_CONFIG = re.compile(r"rope_freqs\.weight$|rope_factors_(long|short)\.weight$")  # gguf_config.py reads them
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
        self._names = Names(architecture, self._count("block_count"), heads, kv_heads or heads)
        self._names.stored(_TABLE)  # refuses other families

    def key(self, name: str) -> str | None:
        """The file's name of a parameter, the first one of several; None if the file does not have it.

        A head that is not stored is the embedding.
        """
        if (several := self._names.experts(name)) is not None:
            return several[0] if all(n in self.file.tensors for n in several) else None
        found = self._names.stored(name)
        if name == _HEAD and found not in self.file.tensors:
            found = self._names.stored(_TABLE)
        return found if found in self.file.tensors else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, as transformers has it."""
        if (several := self._names.experts(name)) is None:
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
        if (several := self._names.experts(name)) is not None:
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
        if self._names.is_lifted(name):
            found = found.float() - 1
        return found

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """Exactly what is stored of a matrix, of ranges of its outputs, or block by block of its inputs.

        Returns:
            None for plain floats, and where a block ends within a group.
        """
        stored = self._stored(name)
        if stored.kind in PLAIN or len(stored.shape) != 2:
            return None
        rows = [Range(0, stored.shape[0])] if outputs is None else outputs
        order = np.concatenate([self._places(name, r) for r in rows])
        parts: list[Quantised | None] = []
        for run in _runs([Range(0, stored.shape[1])] if blocks is None else blocks):
            first, last = run[0].start, run[-1].stop
            if blocks is None:
                raw, start = stored.data[order], 0
                self.bytes_read += raw.nbytes
            else:
                raw, start = self._blocks(stored, Range(first, last))
                raw = raw[order]
            made = quantised(raw, stored.kind)
            assert made is not None, "blocks"
            parts += [made.columns(Range(b.start - start, b.stop - start)) for b in run]
        found = [p for p in parts if p is not None]
        return found if len(found) == len(parts) else None

    def read_experts(self, name: str, experts: Sequence[int]) -> Tensor:
        """Some experts of a stacked weight: gate_up [E, 2f, d] or down [E, d, f]."""
        return self.read(name, ranges=[Range(e, e + 1) for e in experts])

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """Exactly what is stored of one expert; None for plain floats, and where gate and up differ in their type."""
        self._stored(name)
        found = []
        for stored in (self.file.tensors[n] for n in self._names.experts(name) or ()):
            rows = stored.shape[1]
            raw = stored.data[expert * rows : (expert + 1) * rows]
            self.bytes_read += raw.nbytes
            found.append(quantised(raw, stored.kind))
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or not alike(parts):
            return None
        both = joined(parts)
        turns = len(parts) > 1 and self._is_transposed
        return both.picked(np.arange(both.outputs).reshape(2, -1).T.reshape(-1)) if turns else both

    @cached_property
    def names(self) -> StoredNames:
        """Which tensor is which parameter of transformers' model."""
        model = meta_model(config_of(self.file), torch.float32)
        found = StoredNames()
        for name in model.state_dict():
            if (key := self.key(name)) is not None:
                found.keys[name], found.shapes[name] = key, self.shape(name)
        used = {*found.keys.values(), *(k for n in found.keys for k in self._names.experts(n) or ())}
        found.unused = [k for k in self.file.tensors if k not in used and not _IN_CONFIG.match(k)]
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter that the file has."""
        return self.names.shapes

    @property
    def folder(self) -> Path:
        """The file, or the first part of a split one."""
        return self.file.files[0]

    def file_of(self, key: str) -> str:
        """The file that a tensor is in."""
        return self.file.tensors[key].file.name

    def type_of(self, key: str) -> str:
        """F32 for what is read from blocks."""
        kind = self.file.tensors[key].kind
        return kind.name if kind in PLAIN or kind not in QUANTISED else "F32"

    def equal(self, key: str, other: str) -> bool:
        """Whether two tensors have the same bytes."""
        a, b = self.file.tensors[key], self.file.tensors[other]
        return a.kind == b.kind and a.shape == b.shape and np.array_equal(a.data, b.data)

    def config_text(self) -> str:
        """The model's config, as JSON."""
        return config_of(self.file).to_json_string()

    def stored(self) -> StoredWeights:
        """The format that is nearest to most of the stored numbers."""
        counts, sizes = Counter[str](), Counter[Kind]()
        for name, tensor in self.file.tensors.items():
            if len(tensor.shape) > 1 and not name.startswith(("token_embd", "output")):
                four = "int4" if tensor.kind in _FOUR_BITS else "int8"
                counts[PLAIN.get(tensor.kind) or four] += math.prod(tensor.shape)
                sizes[tensor.kind] += math.prod(tensor.shape)
        (most, _), *_ = counts.most_common(1) or [("float32", 0)]
        if most in PLAIN.values():
            return StoredWeights(most)
        bits = sum(n * _resident_bits(k) for k, n in sizes.items()) / sizes.total()
        return StoredWeights(most, bits)

    def inexact(self) -> list[str]:
        """Names of layers' matrices that `read_quantised` does not give."""
        keys = self.names.keys
        return plain_in_layers(self.shapes, {n for n, k in keys.items() if self.file.tensors[k].kind not in PLAIN})

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
        return self._names.architecture == "gpt-oss"

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
        order = self._names.order(name, stored.shape[0]) if stored.shape else None
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
        stored = self.file.tensors[key]
        if self._names.is_row(name) and len(stored.shape) == 1:
            return replace(stored, shape=(1, *stored.shape))
        return stored

    def _count(self, key: str) -> int:
        value = self.file.metadata.get(f"{self.file.architecture}.{key}", 0)
        if not isinstance(value, int) or not 0 <= value <= 100_000:
            raise ModelError(f"GGUF file {self.file.files[0]}: {self.file.architecture}.{key}", expected="a number",
                             actual=value, remedy="use a model whose layers are alike")  # fmt: skip
        return value


def _resident_bits(kind: Kind) -> float:
    """Of a weight of this type in memory."""
    if kind in PLAIN:
        return resident_bits(8, 32)
    bits = 4 if kind in _FOUR_BITS else 8
    return resident_bits(bits, 16 if kind in _GROUPS_OF_16 else 32, minima=kind in _WITH_MINIMA)


def _runs(blocks: Sequence[Range]) -> list[list[Range]]:
    """Blocks that lie side by side, together."""
    runs: list[list[Range]] = []
    for block in blocks:
        if runs and runs[-1][-1].stop == block.start:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
