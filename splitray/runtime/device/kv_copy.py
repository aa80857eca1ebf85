"""KV of a session from one device to another, each copy over a connection of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from splitray.runtime.device.holding import Holding
from splitray.runtime.wire import Channel
from splitray.runtime.wire.calls import ask, send_tensor
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import KvOrder, KvSource

_SILENT_S = 20.0  # after which a device that is to send counts as gone


def fetch(staged: Holding, source: KvSource, session: int, start: int, stop: int, *, token: bytes) -> int:
    """Copy the positions [start, stop) of what `source` has into what is staged here.

    Returns:
        Bytes that came over the wire.

    Raises:
        DeviceLost: the source is gone, or has not that epoch any more.
    """
    if start >= stop:
        return 0
    channel = dial(source.endpoint, me="side/kv", peer=source.device, token=token, deadline_s=_SILENT_S)
    wanted, got = iter(source.pieces), list[Tensor]()
    copied = 0

    def take(tensor: Tensor) -> None:
        nonlocal copied
        got.append(tensor)
        copied += tensor.nbytes
        if len(got) == 2:
            piece = next(wanted)
            if got[0].ndim > 1:
                staged.write(session, piece, start, *got)
            got.clear()

    try:
        ask(channel, KvOrder(session=session, epoch=source.epoch, pieces=source.pieces, start=start, stop=stop), take)
    finally:
        channel.close()
    return copied


def send(channel: Channel, holding: Holding, order: KvOrder) -> None:
    """The other end of `fetch`: keys, then values of each piece; two empty tensors where it has none."""
    for piece in order.pieces:
        none = torch.empty(0), torch.empty(0)
        for tensor in holding.read(order.session, piece, order.start, order.stop) or none:
            send_tensor(channel, tensor)
