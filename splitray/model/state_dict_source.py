"""Weights of a model in memory, slice by slice: for probes and tests."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitray.arch import Range
from splitray.model.weights.quantised import Quantised


class StateDictSource:
    """Slices out of a model in memory, for probes and tests; the same calls as Checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Refer to the model's tensors; nothing is copied until a slice is read."""
        self.config = model.config
        self._tensors = model.state_dict()
        self.bytes_read = 0

    def key(self, name: str) -> str | None:
        """The name itself if the model has it."""
        return name if name in self._tensors else None

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """A copy of a tensor, or of ranges of it along one axis."""
        tensor = self._tensors[name]
        if ranges is None:
            return tensor.clone()
        return torch.cat([tensor.narrow(axis, r.start, r.count) for r in ranges], dim=axis)

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """Nothing: all are floats."""
        return None

    def read_experts(self, name: str, experts: Sequence[int]) -> Tensor:
        """A copy of some experts of a stacked weight."""
        return self._tensors[name][torch.tensor(experts)]

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """Nothing: all are floats."""
        return None

    def fingerprint(self) -> str:
        """Models in memory are told apart by identity only."""
        return f"memory-{id(self._tensors):x}"
