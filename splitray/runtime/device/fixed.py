"""The exchange rule where partial sums are made in fixed blocks: they cross as float64 and are rounded once.

Whoever adds what in which order, the sum has the same bits (model/weights/sums.py); the residual that goes on is
float32. Where activations are rounded to 8 bits nothing less keeps a token from depending on the placement: a sum that
differs in its last bit turns over a rounding in the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitray.model.split_layer import Array
from splitray.model.weights.sums import lifted, on_grid, tensor_on_grid
from splitray.runtime.device.crossing import FLOAT64, Crossing, Plan


class FixedCrossing(Crossing):
    """A `Crossing` whose partials are float64."""

    def _partitioned(
        self,
        index: int,
        plan: Plan,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        mine: Tensor | None = None
        if plan.member:
            assert x_BTD is not None and y_BTD is not None, f"a holder of {index} without residual or partial"
            mine = tensor_on_grid(y_BTD)
            if plan.lead and settle is None:
                mine = mine + tensor_on_grid(x_BTD)
            for peer in plan.partial_to:
                self._send(peer, index, mine)
            if plan.both_to:
                both = torch.cat([t.contiguous().view(torch.uint8) for t in (mine, x_BTD)], dim=-1)
                for peer in plan.both_to:
                    self._send(peer, index, both)
        if not plan.parts:
            self.wire.flush()
            return None
        total: Tensor | None = None
        for peer in plan.parts:
            part = mine if peer == self.me else self._receive(peer, index)
            assert part is not None, "own partial exists for a holder"
            if settle is not None and not plan.member and peer == plan.parts[0]:
                first, apart = part.split([8 * self._hidden, 4 * self._hidden], dim=-1)
                part, x_BTD = first.contiguous().view(torch.float64), apart.contiguous().view(torch.float32)
            total = part if total is None else total + part
        self.wire.flush()
        assert total is not None, "a partitioned sub-block has holders"
        if settle is None:
            return total.float()
        assert x_BTD is not None, "the lead sends x apart to whoever lacks it"
        return settle(x_BTD, total.float())

    def _whole(
        self,
        index: int,
        plan: Plan,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        if plan.member and y_BTD is not None:
            assert x_BTD is not None, f"a holder of {index} without residual"
            total = tensor_on_grid(y_BTD)
            x_BTD = (tensor_on_grid(x_BTD) + total).float() if settle is None else settle(x_BTD, total.float())
            y_BTD = None
        return super()._whole(index, plan, x_BTD, y_BTD, settle)

    def cross_row(self, index: int, x_D: Array | None, y_D: Array | None) -> Array | None:
        """Leave sub-block `index` with one row."""
        plan = self.plans[index]
        mine: Any = None
        if plan.member and y_D is not None:
            assert x_D is not None, f"a holder of {index} without residual"
            mine = lifted(y_D)
            if plan.lead or not plan.partitioned:
                mine = mine + on_grid(x_D)
        if not plan.partitioned:
            return super().cross_row(index, x_D if mine is None else mine.astype(np.float32), None)
        for peer in plan.row_to:
            self.send_row(peer, index, mine)
        self.wire.flush()
        parts = [mine if p == self.me else self.receive_row(p, index, FLOAT64) for p in plan.parts]
        return sum(parts[1:], parts[0]).astype(np.float32) if parts else None

    def settle_row(
        self, index: int, x_D: Array | None, y_D: Array | None, settle: Callable[[Array, Array], Array]
    ) -> Array | None:
        """As `cross_row`, by the messages of `cross`."""

        def settle_rows(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
            return torch.from_numpy(settle(x_BTD.view(-1).numpy(), y_BTD.view(-1).numpy())).view(x_BTD.shape)

        x, y = (None if row is None else torch.from_numpy(row)[None, None] for row in (x_D, y_D))
        out = self.cross(index, x, y, settle_rows)
        return None if out is None else out.view(-1).numpy()
