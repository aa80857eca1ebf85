"""A checkpoint whose weights are stored quantised, read as if they were plain: float32, or the exact whole numbers.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.source import Checkpoint
from splitray.model.stored_names import plain_in_layers
from splitray.model.weights.quantised import Quantised, alike, joined
from splitray.model.weights.stored.floats8 import Floats8, Mxfp4, fp8, mxfp4
from splitray.model.weights.stored.integers import Integers, awq, compressed, gptq
from splitray.model.weights.stored.method import PLAIN, StoredMethod
from splitray.model.weights.stored.slab import Slab
from splitray.weight_formats import StoredWeights, as_format

Stored = Integers | Floats8 | Mxfp4
_ENDS = {
    "awq": (".qweight",),
    "gptq": (".qweight",),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "fp8": (".weight_scale_inv", ".weight_scale"),
    "mxfp4": ("_blocks",),
}
_SCALES = ("F32", "F16", "BF16", "F64")
_TYPES = {  # of stored tensors, by the ends of their names
    (".qweight", ".qzeros", ".weight_packed"): ("I32",),
    (".scales",): _SCALES,
    (".weight_scale", ".weight_scale_inv"): (*_SCALES, "U8", "F8_E8M0"),  # the last two are exponents
    ("_blocks", "_scales"): ("U8",),
}
_FFN = (  # the weight whose inputs are columns of an FFN, and those whose outputs are
    ("down_proj", "gate_proj", "up_proj", "gate_up_proj"),
    ("fc2", "fc1"),
    ("w2", "w1", "w3"),
    ("c_proj", "c_fc"),
    ("dense_4h_to_h", "dense_h_to_4h"),
)
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point", ".k_scale", ".v_scale", ".output_scale")


class PackedCheckpoint(Checkpoint):
    """Names and shapes are those of the plain weights; `bytes_read` counts what is read in its stored form."""

    def __init__(self, folder: str | Path, method: StoredMethod) -> None:
        """Open the headers and find the matrices in them that were quantised by a method.

        Raises:
            ModelError: as for plain weights; or tensors that do not fit together.
        """
        super().__init__(folder)
        self.method = method
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
        if not self.matrices and method.version != "dense":
            remedy = "take quantization_config out of config.json if these are plain weights, or copy the model again"
            raise ModelError(f"weights in {self.folder}", expected=f"tensors quantised by {method.name}",
                             actual=f"{len(stored)} plain ones", remedy=remedy)  # fmt: skip
        self._hidden = {k for m in self.matrices.values() for k in m.keys}
        for key in sorted(self._hidden):
            expected = next((known for ends, known in _TYPES.items() if key.endswith(ends)), (types[key],))
            if types[key] not in expected:
                raise ModelError(f"{key} in {self.folder}", expected=" or ".join(expected), actual=types[key],
                                 remedy=f"copy the checkpoint again, or {PLAIN}")  # fmt: skip
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

    @cached_property
    def _orders(self) -> dict[str, NDArray[np.int64]]:
        """Of act-order FFNs: the order in which their columns are given, by the name of each weight that has them.

        The inputs of `down` are sorted by their groups, and with them the outputs of what makes them: the model is the
        same, and a run of its columns has whole groups.
        """
        orders: dict[str, NDArray[np.int64]] = {}
        for down, *before in _FFN:
            for name in [n for n in self.matrices if n.endswith(f".{down}.weight")]:
                matrix = self.matrices[name]
                order = matrix.order(self._stored) if isinstance(matrix, Integers) else None
                layer = name.removesuffix(f"{down}.weight")
                if order is None or not any(f"{layer}{other}.weight" in self.shapes for other in before):
                    continue  # an attention's output may have the same name: its inputs are heads
                orders[name] = order
                for other, end in product(before, ("weight", "bias")):
                    shape = self.shapes.get(f"{layer}{other}.{end}", (0,))
                    if shape[0] and shape[0] % len(order) == 0:
                        times = range(shape[0] // len(order))
                        orders[f"{layer}{other}.{end}"] = np.concatenate([order + i * len(order) for i in times])
        return orders

    def _order_along(self, key: str, axis: int) -> NDArray[np.int64] | None:
        """In which order rows (axis 0) or columns are given; None: as they are stored."""
        is_down = any(key.endswith(f".{down}.weight") for down, *_ in _FFN)
        return self._orders.get(key) if axis == int(is_down) else None

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """As a plain checkpoint's; quantised weights in float32, and only the words of those ranges are read."""
        if name not in self.matrices and self._is_made(name):
            return self._made(name, axis, ranges)
        key = self._required(name)
        other = self._order_along(key, 1 - axis)
        order = self._order_along(key, axis)
        if order is None:
            found = self._read(key, axis, ranges)
        else:
            places = order if ranges is None else np.concatenate([order[r.start : r.stop] for r in ranges])
            found = self._read(key, axis, None).index_select(axis, torch.from_numpy(places))
        return found if other is None or found.ndim < 2 else found.index_select(1 - axis, torch.from_numpy(other))

    def _read(self, key: str, axis: int, ranges: Sequence[Range] | None) -> Tensor:
        matrix = self.matrices.get(key)
        if matrix is None:
            return super().read(key, axis=axis, ranges=ranges)
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

    def stored(self) -> StoredWeights:
        """The format that is nearest to most of the quantised numbers."""
        counts, sizes = Counter[str](), Counter[str]()
        for matrix in self.matrices.values():
            four = isinstance(matrix, Integers) and matrix.bits == 4
            group = matrix.group if isinstance(matrix, Integers) else 0
            name = "int8" if not four else "int4" if group < 128 else "int4/128"
            counts[name] += math.prod(matrix.shape)
            if not isinstance(matrix, Floats8):
                sizes[name] += math.prod(matrix.shape)
        (most, _), *_ = counts.most_common(1) or [("float32", 0)]
        if not sizes:
            return StoredWeights(most)
        bits = sum(n * as_format(f).resident_bits for f, n in sizes.items()) / sizes.total()
        return StoredWeights(most, bits)

    def inexact(self) -> list[str]:
        """Names of layers' matrices that `read_quantised` does not give, or not to devices that share them."""
        turned = [n for n, m in self.matrices.items() if isinstance(m, Integers) and self._sums_in_order(n, m)]
        others = [n for n, m in self.matrices.items() if isinstance(m, Floats8)]
        return others + turned + plain_in_layers(self.shapes, self.matrices)

    def _sums_in_order(self, name: str, matrix: Integers) -> bool:
        """Whether heads share a matrix whose inputs are not stored in their order."""
        is_out = re.search(r"\.(?:o_proj|out_proj|wo)\.weight$", name) is not None
        return is_out and matrix.order(self._stored) is not None

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """Exactly what is stored of a matrix, of ranges of its outputs, or block by block of its inputs.

        Returns:
            None for plain weights and 8-bit floats, and where the groups of those inputs are such as no kernel reads.
        """
        key = self._required(name)
        matrix = self.matrices.get(key)
        if not isinstance(matrix, Integers):
            return None
        order, given = matrix.order(self._stored), self._order_along(key, 1) is not None
        if blocks is not None and order is not None and not given:
            return None
        turned = self._order_along(key, 0)
        rows = [Range(0, matrix.shape[0])] if outputs is None or turned is not None else outputs
        found = []
        for block in [Range(0, matrix.shape[1])] if blocks is None else blocks:
            try:
                made = joined([self._slab(matrix, r, block).quantised() for r in rows])
            except ModelError:
                return None
            if turned is not None:
                wanted = [Range(0, len(turned))] if outputs is None else outputs
                made = made.picked(np.concatenate([turned[r.start : r.stop] for r in wanted]))
            found.append(made if order is None or given else replace(made, order=order))
        return found

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """Exactly what is stored of one expert; None for 8-bit floats, and where gate and up differ in their form."""
        matrix = self.matrices.get(self.key(name) or "")
        if isinstance(matrix, Mxfp4):
            _, outputs, inputs = matrix.shape
            return matrix.slab(self._stored, expert, Range(0, outputs), Range(0, inputs)).quantised()
        parts = [self.read_quantised(n) for n in self._of_expert(name, expert)]
        found = [part[0] for part in parts if part is not None]
        return joined(found) if found and len(found) == len(parts) and alike(found) else None

    def _slab(self, matrix: Integers, outputs: Range, inputs: Range) -> Slab:
        """Inputs count in the matrix's own order, if it has one."""
        order = matrix.order(self._stored)
        if order is None:
            return matrix.slab(self._stored, outputs, inputs)
        return matrix.slab(self._stored, outputs, Range(0, matrix.shape[1])).taken(order[inputs.start : inputs.stop])

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
