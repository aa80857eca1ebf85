"""What a device answers while a run goes on: staging of the next placement, copies of KV, checkpoints, a sign of life.

One thread for each engine or device that has dialled; the run has its own.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import ClassVar, get_args

from splitray.errors import DeviceLost
from splitray.model.opened import Opened
from splitray.runtime.checkpoint import Store
from splitray.runtime.device import kv_copy, probes
from splitray.runtime.device.busy import Busy
from splitray.runtime.device.epochs import Epochs
from splitray.runtime.device.lending import LendOrder, lend
from splitray.runtime.wire import Channel, Pace, answers, messages
from splitray.runtime.wire.answers import Answer
from splitray.runtime.wire.calls import Takes, carry_out, send_tensor

_IN_FLIGHT_BYTES = 1 << 17


class Side:
    """Serves one such connection."""

    def __init__(
        self, channel: Channel, epochs: Epochs, *, token: bytes, pace: Pace, busy: Busy,
        abort: Callable[[int], dict[int, int]],
    ) -> None:  # fmt: skip
        """Start at once. `token` is to dial peers, `pace` that of all connections to them.

        `abort` stops whatever runs and goes back to an epoch: see `Epochs.take_back`.
        """
        self._channel, self._epochs = channel, epochs
        self._token, self._pace, self._busy, self._abort_run = token, pace, busy, abort
        self._opened: dict[str, Opened] = {}
        # Copies share links with the run: what waits in a socket's buffer delays every token behind it.
        channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _IN_FLIGHT_BYTES)
        self._thread = threading.Thread(target=self._serve, name=f"splitray-side-{epochs.device}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the other end is still there."""
        return self._thread.is_alive()

    def cut(self) -> None:
        """End the connection."""
        self._channel.close()

    def close(self) -> None:
        """End the connection and wait for the thread."""
        self.cut()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                frame = self._channel.read()
                assert frame is not None, "a blocking read returns a frame"
                carry_out(self._channel, frame.payload, self.TAKES, self)
            except (DeviceLost, OSError):
                self._channel.close()
                return

    def _abort(self, order: messages.AbortOrder) -> Answer:
        positions = self._abort_run(order.epoch)
        return answers.Stopped(epoch=self._epochs.number, positions=positions)

    def _set_pace(self, order: messages.PaceOrder) -> Answer:
        self._pace.bytes_per_s = order.bytes_per_s
        return answers.Done()

    def _ready(self, order: messages.ReadyOrder) -> Answer:
        self._epochs.make_ready(order.assignment, order.lenders)
        return answers.Done()

    def _kv(self, order: messages.KvOrder) -> Answer:
        kv_copy.send(self._channel, self._epochs.of(order.epoch), order)
        return answers.Done()

    def _checkpoint(self, order: messages.CheckpointOrder) -> Answer:
        holding, began = self._epochs.of(order.epoch), time.thread_time()
        saved = Store(order.store).save(holding, order.session, self._epochs.device, order.start, order.stop)
        return answers.Written(file=saved, cpu_s=time.thread_time() - began)

    def _lend(self, order: LendOrder) -> Answer:
        answer, tensors = lend(order, self._opened)
        for tensor in tensors:
            send_tensor(self._channel, tensor)
        return answer

    TAKES: ClassVar[Takes] = {
        messages.PingOrder: lambda self, _: answers.Alive(epoch=self._epochs.number),
        messages.PaceOrder: _set_pace,
        messages.BusyOrder: lambda self, _: self._busy.look(),
        messages.ReachOrder: lambda self, order: probes.reach(order, self._token),
        messages.ProbeOrder: lambda self, order: probes.probe(order, self._token, self._pace),
        messages.BounceOrder: lambda self, order: probes.bounce(self._channel, order),
        messages.StatsOrder: lambda self, _: self._epochs.stats(),
        messages.AbortOrder: _abort,
        messages.StageOrder: lambda self, order: self._epochs.stage(order),
        messages.ReadyOrder: _ready,
        messages.KvOrder: _kv,
        messages.CheckpointOrder: _checkpoint,
        **dict.fromkeys(get_args(LendOrder), _lend),
    }
