"""The exchange rule with a lossy codec on the wire: who adds what, so that all holders keep the same bits.

What a codec applies to stands in codecs.py. Values go through float32 and back to the model's own type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from splitray.arch import ModelArch
from splitray.codecs import Codec, decode, encode, encoded_bytes
from splitray.model.split_layer import Array
from splitray.route import Route
from splitray.runtime.device.crossing import Crossing, Plan
from splitray.runtime.wire import Wire
from splitray.runtime.wire.tensors import TORCH_DTYPES, tensor_of


class CodedCrossing(Crossing):
    """A `Crossing` whose partials and states travel in the codec of its route."""

    def __init__(self, me: str, route: Route, arch: ModelArch, wire: Wire) -> None:
        """As `Crossing`; notes which boundaries a whole state crosses."""
        super().__init__(me, route, arch, wire)
        self.codec: Codec = route.codec
        self._dtype = TORCH_DTYPES[arch.dtype]
        self._part_bytes = encoded_bytes(route.codec, 1, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
        self._rounds_state = {b.after for b in route.boundaries if any(m.content == "state" for m in b.messages)}

    def cross_row(self, index: int, x_D: Array | None, y_D: Array | None) -> Array | None:
        """One row by the way of a prompt: coding costs more than torch's frame around it."""
        x, y = (None if row is None else torch.from_numpy(row)[None, None] for row in (x_D, y_D))
        out = self.cross(index, x, y, None)
        return None if out is None else out.view(-1).numpy()

    def settle_row(
        self, index: int, x_D: Array | None, y_D: Array | None, settle: Callable[[Array, Array], Array]
    ) -> Array | None:
        """As `cross_row`."""

        def settle_rows(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
            return torch.from_numpy(settle(x_BTD.view(-1).numpy(), y_BTD.view(-1).numpy())).view(x_BTD.shape)

        x, y = (None if row is None else torch.from_numpy(row)[None, None] for row in (x_D, y_D))
        out = self.cross(index, x, y, settle_rows)
        return None if out is None else out.view(-1).numpy()

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
            mine = self._encode(y_BTD)
            for peer in plan.partial_to:
                self._send(peer, index, mine)
            if plan.both_to:
                both = torch.cat([mine, x_BTD.cpu().contiguous().view(torch.uint8)], dim=-1)
                for peer in plan.both_to:
                    self._send(peer, index, both)
        total: Tensor | None = None
        for peer in plan.parts:
            part = mine if peer == self.me else tensor_of(self._frame(peer, index, inner=False))
            assert part is not None, "own partial exists for a holder"
            if not plan.member and peer == plan.parts[0]:
                part, apart = part.split([self._part_bytes, part.shape[-1] - self._part_bytes], dim=-1)
                x_BTD = self._arrived(peer, index, apart.contiguous().view(self._dtype).to(self.torch_device))
            value = self._decode(part)
            if peer != self.me:
                value = self._arrived(peer, index, value, coded=True)
            total = value if total is None else total + value
        self.wire.flush()
        if total is None:
            return None
        assert x_BTD is not None, "the lead sends x apart to whoever lacks it"
        return x_BTD + total if settle is None else settle(x_BTD, total)

    def _send_state(self, index: int, plan: Plan, x_BTD: Tensor) -> Tensor:
        if index not in self._rounds_state:
            return x_BTD
        coded = self._encode(x_BTD)
        for peer in plan.state_to:
            self._send(peer, index, coded)
        self.wire.flush()
        return self._decode(coded)

    def _receive_state(self, peer: str, index: int) -> Tensor:
        value = self._decode(tensor_of(self._frame(peer, index, inner=False)))
        return self._arrived(peer, index, value, coded=True)

    def _arrived(self, peer: str, index: int, value_BTD: Tensor, *, coded: bool = False) -> Tensor:
        """What a peer sent, as the way left it: here intact."""
        return value_BTD

    def _encode(self, x_BTD: Tensor) -> Tensor:
        if self.codec == "none":
            return x_BTD.cpu().contiguous().view(torch.uint8)
        *shape, hidden = x_BTD.shape
        rows_ND = x_BTD.detach().float().cpu().reshape(-1, hidden).numpy()
        return torch.from_numpy(encode(self.codec, rows_ND)).view(*shape, self._part_bytes)

    def _decode(self, coded_BTB: Tensor) -> Tensor:
        if self.codec == "none":
            return coded_BTB.contiguous().view(self._dtype).to(self.torch_device)
        rows_NB: np.ndarray = coded_BTB.reshape(-1, self._part_bytes).numpy()
        rows_ND = torch.from_numpy(decode(self.codec, rows_NB, self._hidden))
        return rows_ND.view(*coded_BTB.shape[:-1], self._hidden).to(self.torch_device, self._dtype)
