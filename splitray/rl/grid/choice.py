"""N placements of one model on two devices, as arrays: what a learned policy may choose. Knows no model and no cost.

Shapes: N instances, G decision groups (runs of layers that are placed alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitray.arrays import Bools, Ints

EDGE, CLOUD, SPLIT, COPIED = 0, 1, 2, 3  # the first two are also the indices of the devices
MODES = 4
SIXTEENTHS = 16  # of the columns of an FFN


@dataclass(frozen=True, slots=True)
class Choice:
    """N placements; `Grid` says what they mean.

    EDGE and CLOUD put whole layers there; SPLIT shares heads and columns as said here; COPIED replicates attention on
    both devices and shares columns. `heads` counts only under SPLIT, `ffn` only under SPLIT and COPIED.
    """

    mode: NDArray[np.int8]  # [N, G]
    heads: Ints  # [N, G], KV-head groups on the edge; none or all of them: attention whole on one device
    ffn: Ints  # [N, G], sixteenths of the columns on the edge
    embedding: Ints  # [N], device index
    head: Ints  # [N], device index of the whole lm_head

    @property
    def num_instances(self) -> int:
        """N, the number of placements side by side."""
        return len(self.mode)

    def take(self, rows: Any) -> Choice:
        """The instances that a numpy index of the first axis selects."""
        return Choice(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def put(self, rows: Any, other: Choice) -> None:
        """Overwrite the instances that a numpy index of the first axis selects, in place."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)

    @staticmethod
    def stack(choices: Sequence[Choice]) -> Choice:
        """Choices of one grid side by side."""
        return Choice(**{f.name: np.concatenate([getattr(c, f.name) for c in choices]) for f in fields(Choice)})

    def same_as(self, other: Choice) -> Bools:
        """Which instances are the same placement, [N], whatever stands in fields that do not count."""
        split = self.mode == SPLIT
        alike = (self.mode == other.mode) & ((self.heads == other.heads) | ~split)
        alike &= (self.ffn == other.ffn) | ~(split | (self.mode == COPIED))
        return alike.all(1) & (self.embedding == other.embedding) & (self.head == other.head)
