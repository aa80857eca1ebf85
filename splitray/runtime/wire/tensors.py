"""Tensors as a frame carries them: the name of their type in its header, their bytes as its payload."""

import torch
from torch import Tensor

from splitray.runtime.wire.frames import Frame

TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
                "float16": torch.float16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NUMPY_KNOWS = {torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.float16}


def payload_of(tensor: Tensor) -> tuple[Tensor, memoryview]:
    """A contiguous CPU view of a tensor, and its bytes (shared, not copied, where it was one already)."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    if not tensor.numel():
        return tensor, memoryview(b"")
    flat = tensor if tensor.dtype in _NUMPY_KNOWS else tensor.view(torch.uint8)
    return tensor, memoryview(flat.reshape(-1).numpy()).cast("B")  # type: ignore[arg-type]


def tensor_of(frame: Frame) -> Tensor:
    """The tensor that a frame carries; it shares the frame's buffer."""
    dtype = TORCH_DTYPES[frame.dtype]
    if not frame.payload:
        return torch.empty(frame.shape, dtype=dtype)
    return torch.frombuffer(frame.payload, dtype=dtype).view(frame.shape)
