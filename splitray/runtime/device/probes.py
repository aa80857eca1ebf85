"""What a device finds out about its ways to other devices, for profiles, benches, monitor and recovery."""

from __future__ import annotations

import time

import numpy as np
import torch

from splitray.errors import DeviceLost
from splitray.runtime.device.crossing import Crossing, Step
from splitray.runtime.device.speed import cold_ffn
from splitray.runtime.wire import Channel, Pace
from splitray.runtime.wire.answers import Done, LinkRates, RoundTrips, Unreached
from splitray.runtime.wire.calls import ask, send_tensor
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import BounceOrder, EchoOrder, ProbeOrder, ReachOrder

_LEAST_S = 1e-6  # that bytes take, where the clock says nothing


def echo(crossing: Crossing, order: EchoOrder, epoch: int) -> RoundTrips:
    """Round trips through the code of decoding, over the connection that runs use; see `EchoOrder`."""
    wire, peer = crossing.wire, order.peer
    row = np.zeros(order.size // 4, np.float32)
    work = cold_ffn(order.cold_bytes)[0] if order.cold_bytes else None
    wire.begin(order.attempt)
    wire.epoch, wire.waits.alike = epoch, True  # as a decode step's frames
    times, worked = [], []

    def read_weights() -> None:
        if work is not None:
            begin = time.perf_counter()
            work()
            worked.append(time.perf_counter() - begin)

    for i in range(order.rounds):
        crossing.step = Step(0, epoch, order.attempt, i, 1)
        if order.first:
            read_weights()
        start = time.perf_counter()
        if order.first:
            crossing.send_row(peer, 0, row)
        row = crossing.receive_row(peer, 0)
        if not order.first:
            read_weights()
            crossing.send_row(peer, 0, row)
            wire.flush()  # a large frame does not leave at once, and nothing else waits for the last one
        times.append(time.perf_counter() - start)
    return RoundTrips(round_trip_s=times, worked_s=worked)


def reach(order: ReachOrder, token: bytes) -> Unreached:
    """Dial each peer anew and hang up."""
    failed = []
    for peer, endpoint in order.peers.items():
        try:
            dial(endpoint, me="side/probe", peer=peer, token=token, deadline_s=order.within_s,
                 within_s=order.within_s).close()  # fmt: skip
        except DeviceLost:
            failed.append(peer)
    return Unreached(peers=failed)


def probe(order: ProbeOrder, token: bytes, pace: Pace) -> LinkRates:
    """Time a round trip to a peer, and some bytes each way, over a connection of its own, at this device's pace."""
    size = order.num_bytes
    channel = dial(order.endpoint, me="side/probe", peer=order.peer, token=token, deadline_s=order.within_s,
                   within_s=order.within_s)  # fmt: skip
    channel.pace = pace

    def timed(there: int, back: int) -> float:
        began = time.perf_counter()
        ask(channel, BounceOrder(num_bytes=back, filling=bytes(there)))
        return time.perf_counter() - began

    try:
        rtt_s = min(timed(1, 1) for _ in range(3))
        there_s, back_s = (max(_LEAST_S, timed(*sizes) - rtt_s) for sizes in ((size, 1), (1, size)))
    finally:
        channel.close()
    return LinkRates(rtt_s=rtt_s, there_bytes_per_s=size / there_s, back_bytes_per_s=size / back_s)


def bounce(channel: Channel, order: BounceOrder) -> Done:
    """The other end of `probe`."""
    send_tensor(channel, torch.zeros(order.num_bytes, dtype=torch.uint8))
    return Done()
