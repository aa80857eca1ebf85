"""Multiplication by a quantised matrix: onnxruntime's MatMulNBits, its activations rounded to 8 bits group by group.

Shapes: N rows, I inputs, O outputs, B blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from splitray.arrays import Floats32
from splitray.model.weights.quantised import Quantised, quantise

_INTEGERS = 4
"""`accuracy_level`: activations are rounded to 8 bits, so that products are those of whole numbers."""
_IR, _OPSET = 9, 17  # what onnxruntime has read since 2023


class Kernel:
    """x times the transpose of a matrix, in one piece or block by block of the inputs."""

    def __init__(self, parts: Sequence[Quantised]) -> None:
        """`parts` are matrices with the same outputs whose inputs lie side by side; the kernel keeps its own copies."""
        self.outputs, self.inputs = parts[0].outputs, sum(p.inputs for p in parts)
        self.num_bytes = sum(p.num_bytes for p in parts)
        self._session = _session(parts)
        self._pad = any(not rows_alike(p.bits, p.group) for p in parts)

    def __call__(self, x_NI: Floats32) -> Floats32:
        """[N, O] for one part, [B, N, O] for several. Each row is what it would be alone."""
        if len(x_NI) == 1 and self._pad:
            return self._session.run(None, {"x": np.concatenate([x_NI, x_NI])})[0][..., :1, :]  # type: ignore[no-any-return]
        return self._session.run(None, {"x": x_NI})[0]  # type: ignore[no-any-return]


@cache
def rows_alike(bits: int, group: int) -> bool:
    """Whether this machine's kernel computes a single row to the bit as it does among others: tried once."""
    rows = np.random.default_rng(0).standard_normal((66, 8 * group), dtype=np.float32)
    session = _session([quantise(torch.from_numpy(rows[2:]), bits=bits, group=group)])
    both = session.run(None, {"x": rows[:2]})[0]
    return all(np.array_equal(session.run(None, {"x": rows[i : i + 1]})[0][0], both[i]) for i in (0, 1))


def _session(parts: Sequence[Quantised]) -> onnxruntime.InferenceSession:
    nodes: list[Any] = []
    constants: list[TensorProto] = []
    external: dict[str, np.ndarray] = {}
    start = 0
    outs = [f"y{i}" for i in range(len(parts))]
    for i, part in enumerate(parts):
        given: dict[str, Any] = {"w": part.numbers, "s": part.scales.reshape(-1)}
        if part.zeros is not None:
            given["z"] = part.zeros.reshape(-1)
        external |= {f"{name}{i}": value for name, value in given.items()}
        attributes: dict[str, Any] = {"K": part.inputs, "N": part.outputs, "bits": part.bits, "block_size": part.group}
        x = "x" if len(parts) == 1 else f"x{i}"
        nodes.append(helper.make_node("MatMulNBits", [x, *(f"{n}{i}" for n in given)], outs[i:i + 1],
                                      domain="com.microsoft", accuracy_level=_INTEGERS, **attributes))  # fmt: skip
        if part.minima is not None:
            assert part.inputs % part.group == 0, "minima of whole groups"
            external[f"m{i}"] = part.minima.T
            constants.append(helper.make_tensor(f"groups{i}", TensorProto.INT64, [3], [0, -1, part.group]))
            nodes += _minus_minima(nodes[-1], x, i)
        start += part.inputs
    if any(p.minima is not None for p in parts):
        constants.append(helper.make_tensor("last", TensorProto.INT64, [1], [-1]))
    if len(parts) > 1:
        sizes = helper.make_tensor("sizes", TensorProto.INT64, [len(parts)], [p.inputs for p in parts])
        axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
        constants += [sizes, axis]
        nodes.insert(0, helper.make_node("Split", ["x", "sizes"], [f"x{i}" for i in range(len(parts))], axis=1))
        lifted = [f"u{i}" for i in range(len(parts))]
        nodes += [helper.make_node("Unsqueeze", [y, "axis"], [u]) for y, u in zip(outs, lifted, strict=True)]
        nodes.append(helper.make_node("Concat", lifted, ["y"], axis=0))
    else:
        nodes[-1].output[0] = "y"
    shape: list[str | int | None] = ["N", parts[0].outputs]
    if len(parts) > 1:
        shape.insert(0, len(parts))
    graph = helper.make_graph(nodes, "multiply", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", start])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], constants)  # fmt: skip
    graph.initializer.extend(_elsewhere(name, value) for name, value in external.items())
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # each session's own would keep what its largest prompt took
    options.log_severity_level = 3
    # initializers from outside are read once while kernels pack them, and not kept as the model's own bytes are
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for v in external.values()]
    options.add_external_initializers(list(external), values)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _minus_minima(product: Any, x: str, i: int) -> list[Any]:
    """What is left of a product: minima times the sum of the inputs of each group."""
    whole, product.output[0] = product.output[0], f"p{i}"
    return [
        helper.make_node("Reshape", [x, f"groups{i}"], [f"g{i}"]),
        helper.make_node("ReduceSum", [f"g{i}", "last"], [f"t{i}"], keepdims=0),
        helper.make_node("MatMul", [f"t{i}", f"m{i}"], [f"n{i}"]),
        helper.make_node("Sub", [f"p{i}", f"n{i}"], [whole]),
    ]


def _elsewhere(name: str, value: np.ndarray) -> TensorProto:
    """The place of a tensor whose bytes are handed over beside the model."""
    kind = TensorProto.UINT8 if value.dtype == np.uint8 else TensorProto.FLOAT
    tensor = TensorProto(name=name, dims=value.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="beside")
    return tensor
