"""The exchange rule over a noisy channel: what arrives of partials and states at each receiver.

Every receiver has a channel of its own, so holders of one residual come to differ, as they would; the sender goes on
with what it sent. Norm sums, best rows, logits and tokens arrive intact, and so does the order to run: only the
values of the residual are left unprotected, as in Chen et al.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from splitray.arch import ModelArch
from splitray.channel import Receiver
from splitray.route import Route
from splitray.runtime.device.coded import CodedCrossing
from splitray.runtime.device.crossing import Crossing
from splitray.runtime.device.fixed import FixedCrossing
from splitray.runtime.wire import Wire


def crossing_of(device: str, route: Route, arch: ModelArch, wire: Wire) -> Crossing:
    """The crossing that a route asks for: exact, coded, or over a channel."""
    if route.channel is not None:
        return NoisyCrossing(device, route, arch, wire)
    if route.codec != "none":
        return CodedCrossing(device, route, arch, wire)
    return (FixedCrossing if arch.sums_in_blocks else Crossing)(device, route, arch, wire)


class NoisyCrossing(CodedCrossing):
    """A `CodedCrossing` whose partials and states arrive through the channel of its route."""

    def __init__(self, me: str, route: Route, arch: ModelArch, wire: Wire) -> None:
        """As `CodedCrossing`."""
        super().__init__(me, route, arch, wire)
        assert route.channel is not None, "a noisy crossing has a channel"
        self._channel = route.channel
        self._dtype_bytes = arch.dtype_bytes
        self._receivers: dict[str, Receiver] = {}
        self._sessions: dict[int, int] = {}

    def _arrived(self, peer: str, index: int, value_BTD: Tensor, *, coded: bool = False) -> Tensor:
        if peer not in self._receivers:
            self._receivers[peer] = Receiver(self._channel, crc32(peer.encode()), crc32(self.me.encode()))
        step, boundary = self.step, 2 * index + coded
        fresh = step.position == 0 or self._sessions.get(boundary) != step.session
        self._sessions[boundary] = step.session
        arrived = self._receivers[peer].receive(
            value_BTD.detach().float().cpu().numpy(),
            boundary=boundary,
            value_bytes=self._part_bytes / self._hidden if coded else self._dtype_bytes,
            fresh=fresh,
        )
        return torch.from_numpy(arrived).to(value_BTD.device, value_BTD.dtype)
