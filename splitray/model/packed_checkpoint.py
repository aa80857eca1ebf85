"""A checkpoint whose weights are stored quantised, read as if they were plain: float32, or the exact whole numbers.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.folder import config_values
from splitray.model.source import Checkpoint
from splitray.model.weights.quantised import Quantised
from splitray.model.weights.stored.floats8 import Floats8, Mxfp4, fp8, mxfp4
from splitray.model.weights.stored.integers import Integers, awq, compressed, gptq
from splitray.model.weights.stored.method import stored_method
from splitray.model.weights.stored.slab import Slab, side_by_side

Stored = Integers | Floats8 | Mxfp4
_ENDS = {
    "awq": (".qweight",),
    "gptq": (".qweight",),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "fp8": (".weight_scale_inv", ".weight_scale"),
    "mxfp4": ("_blocks",),
}
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point", ".k_scale", ".v_scale", ".output_scale")


def quantization_config(model: str | Path) -> Mapping[str, Any] | None:
    """What a model's config.json, or that of its text part, says of quantised weights; None: they are plain."""
    values = config_values(model)
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return found
    return None


class PackedCheckpoint(Checkpoint):
    """Names and shapes are those of the plain weights; `bytes_read` counts what is read in its stored form."""

    def __init__(self, folder: str | Path) -> None:
        """Open the headers and find the quantised matrices in them.

        Raises:
            ModelError: as for plain weights; or a method that is not read here, or tensors that do not fit together.
        """
        super().__init__(folder)
        self.method = stored_method(quantization_config(folder) or {})
        stored, types = super().shapes, {k: super(PackedCheckpoint, self).type_of(k) for k in self._file_of}
        self.matrices: dict[str, Stored] = {}
        """By the name of the plain weight."""
        for key in stored:
            end = next((e for e in _ENDS[self.method.name] if key.endswith(e)), None)
            if end is not None:
                module = key.removesuffix(end)
                name = module if self.method.name == "mxfp4" else f"{module}.weight"
                if name not in self.matrices:
                    self.matrices[name] = self._matrix(module, stored, types)
        self._hidden = {k for m in self.matrices.values() for k in m.keys}
        self._hidden |= {k for k in stored if k.endswith(_OF_ACTIVATIONS)}

    def _matrix(self, module: str, stored: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> Stored:
        match self.method.name:
            case "awq":
                return awq(module, stored, self.method)
            case "gptq":
                return gptq(module, stored, self.method)
            case "mxfp4":
                return mxfp4(module, stored)
        kind = types.get(f"{module}.weight")
        if self.method.name == "compressed-tensors" and (kind is None or kind == "I8"):
            key = f"{module}.weight_shape"
            shape = self._stored(key, None, None).tolist() if key in stored else None
            return compressed(module, stored, types, None if shape is None else (shape[0], shape[1]))
        if kind != "F8_E4M3":
            raise ModelError(f"quantised weights {module}.weight", expected="F8_E4M3 beside its scales", actual=kind,
                             remedy="use the model's version that is not quantised")  # fmt: skip
        return fp8(module, stored, self.method)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every plain tensor, and of the weights that the quantised ones stand for."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        plain = {k: s for k, s in super().shapes.items() if k not in self._hidden}
        return plain | {n: _plain_shape(m) for n, m in self.matrices.items()}

    def key(self, name: str) -> str | None:
        """The name of the plain weight for a parameter of the model, or None."""
        return name if name in self.shapes else self.names.keys.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the plain weight."""
        return self.shapes[self._required(name)]

    def file_of(self, key: str) -> str:
        """The file that a tensor, or the numbers of a quantised one, is in."""
        return super().file_of(self.matrices[key].keys[0] if key in self.matrices else key)

    def type_of(self, key: str) -> str:
        """F32 for what is read from quantised weights."""
        return "F32" if key in self.matrices else super().type_of(key)

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """As a plain checkpoint's; quantised weights in float32, and only the words of those ranges are read."""
        if name not in self.matrices and self._is_made(name):
            return self._made(name, axis, ranges)
        matrix = self.matrices.get(self._required(name))
        if matrix is None:
            return super().read(name, axis=axis, ranges=ranges)
        if isinstance(matrix, Mxfp4):
            return self._experts(matrix, axis, ranges)
        whole = (Range(0, matrix.shape[0]), Range(0, matrix.shape[1]))
        parts = []
        for r in [whole[axis]] if ranges is None else ranges:
            cut = (r, whole[1]) if axis == 0 else (whole[0], r)
            if isinstance(matrix, Floats8):
                parts.append(matrix.values(self._stored, *cut))
            else:
                parts.append(matrix.slab(self._stored, *cut).values())
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
        return torch.from_numpy(np.ascontiguousarray(joined))

    def exact_bits(self, name: str) -> int | None:
        """Of the whole numbers that a weight is stored in, 4 or 8; None: it is plain, or in 8-bit floats."""
        matrix = self.matrices.get(self.key(name) or "")
        if matrix is None or isinstance(matrix, Floats8):
            return None
        return 8 if isinstance(matrix, Mxfp4) else matrix.bits

    def order(self, name: str) -> NDArray[np.int64] | None:
        """The inputs of a weight in the order in which `read_quantised` gives them; None: as they are.

        With act-order the inputs of a group lie anywhere: `weight[:, order]` has its groups one after the other.
        """
        matrix = self.matrices[self._required(name)]
        return matrix.order(self._stored) if isinstance(matrix, Integers) else None

    def read_quantised(
        self,
        name: str,
        *,
        outputs: Sequence[Range] | None = None,
        inputs: Sequence[Range] | None = None,
        expert: int = 0,
        group: int = 128,
    ) -> Quantised:
        """Exactly what is stored of a weight, in groups of at most `group` inputs; inputs count in `order`.

        `expert` is the one of stacked experts, whose rows are outputs here.

        Raises:
            ModelError: groups are such as no kernel reads, or are cut by the ranges.
        """
        matrix = self.matrices[self._required(name)]
        assert not isinstance(matrix, Floats8), "fp8 has no exact form in whole numbers"
        shape = matrix.shape[-2:]
        of_outputs = [Range(0, shape[0])] if outputs is None else outputs
        of_inputs = [Range(0, shape[1])] if inputs is None else inputs
        rows = [self._row_of_slabs(matrix, expert, r, of_inputs) for r in of_outputs]
        if len(rows) == 1:
            return rows[0].quantised(group)
        first = rows[0]
        zeros = [s.zeros for s in rows if s.zeros is not None]
        return Slab(
            bits=first.bits,
            numbers=np.concatenate([s.numbers for s in rows]),
            scales=np.concatenate([s.scales for s in rows]),
            zeros=np.concatenate(zeros) if zeros else None,
            group_of=first.group_of,
        ).quantised(group)

    def _row_of_slabs(self, matrix: Integers | Mxfp4, expert: int, outputs: Range, inputs: Sequence[Range]) -> Slab:
        if isinstance(matrix, Mxfp4):
            return side_by_side([matrix.slab(self._stored, expert, outputs, r) for r in inputs])
        order = matrix.order(self._stored)
        if order is None:
            return side_by_side([matrix.slab(self._stored, outputs, r) for r in inputs])
        whole = matrix.slab(self._stored, outputs, Range(0, matrix.shape[1]))
        return whole.taken(np.concatenate([order[r.start : r.stop] for r in inputs]))

    def _experts(self, matrix: Mxfp4, axis: int, ranges: Sequence[Range] | None) -> Tensor:
        """Stacked experts [E, I, O], as the model's own parameter is."""
        assert axis == 0 or ranges is None, "experts are taken whole"
        _, outputs, inputs = matrix.shape
        experts = [e for r in (ranges or [Range(0, matrix.shape[0])]) for e in range(r.start, r.stop)]
        found = torch.empty(len(experts), inputs, outputs)
        for at, expert in enumerate(experts):
            slab = matrix.slab(self._stored, expert, Range(0, outputs), Range(0, inputs))
            found[at] = torch.from_numpy(slab.values()).t()
        return found

    def _is_made(self, name: str) -> bool:
        plain = name in self.shapes and len(self.shapes[name]) < 3
        return not plain and name in self.names.made

    def _stored(self, key: str, rows: Range | None, columns: Range | None) -> Tensor:
        """Some of a stored tensor as it is, counted."""
        view = self._slice(key)
        if not view.get_shape():
            part = self._number(key)
        elif rows is None:
            part = view[:]
        elif columns is None:
            part = view[rows.start : rows.stop]
        else:
            part = view[rows.start : rows.stop, columns.start : columns.stop]
        self.bytes_read += part.numel() * part.element_size()
        return part  # type: ignore[no-any-return]


def _plain_shape(matrix: Stored) -> tuple[int, ...]:
    if isinstance(matrix, Mxfp4):
        experts, outputs, inputs = matrix.shape
        return (experts, inputs, outputs)
    return matrix.shape
