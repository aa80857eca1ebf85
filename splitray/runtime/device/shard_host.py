"""The plain class behind each device process, thread or actor: loads a shard, connects to peers, runs orders.

Knows one device. What to hold and when to run comes from the caller; placement is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from splitray.errors import DeviceLost
from splitray.model.state_dict_source import StateDictSource
from splitray.runtime.device import probes
from splitray.runtime.device.busy import Busy
from splitray.runtime.device.crossing import Crossing, Step
from splitray.runtime.device.decode import DecodeLoop
from splitray.runtime.device.epochs import Epochs
from splitray.runtime.device.holding import Holding
from splitray.runtime.device.side import Side
from splitray.runtime.device.speed import speeds
from splitray.runtime.wire import Channel, Endpoint, FreeCores, Kind, Pace, Waits, Wire, answers, messages
from splitray.runtime.wire.answers import Answer
from splitray.runtime.wire.calls import Takes, carry_out, send_tensor
from splitray.runtime.wire.listener import CALLER, DEADLINE_S, SIDE, SIDE_OF_ENGINE, Listener, dial


class ShardHost:
    """Serves one device: listens for peers and for one caller at a time, and executes the caller's orders.

    What it holds is in `epochs`; orders beside a run have a `Side` each.
    """

    def __init__(
        self,
        device: str,
        *,
        token: bytes,
        host: str = "127.0.0.1",
        deadline_s: float = DEADLINE_S,
        source: StateDictSource | None = None,
    ) -> None:
        """Start listening; `source` gives weights in memory instead of a model folder (tests, self-test)."""
        self.wire = Wire()
        self.epochs = Epochs(device, self.wire, token=token, source=source)
        self.device, self._token, self._deadline_s = device, token, deadline_s
        self._pace, self._busy = Pace(), Busy()
        self._caller: Channel | None = None
        self._running = threading.Lock()  # held while an order of the caller is executed
        self._callers: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._joined = threading.Condition()
        self._sides: list[Side] = []
        self._listener = Listener(token=token, host=host, deadline_s=deadline_s, accept=self._accepted)

    @property
    def endpoint(self) -> Endpoint:
        """Where peers and the caller find this device."""
        return self._listener.endpoint

    def serve(self, *, once: bool = False) -> None:
        """Execute callers' orders until `close` (or until the first caller leaves, if `once`)."""
        last = ""
        while (channel := self._callers.get()) is not None:
            if channel.peer != last:  # another engine: what the last one left behind is of no use to it
                self._forget()
            self._caller, last = channel, channel.peer
            self._serve(channel)
            channel.close()
            if once:
                break
        self._release()

    def close(self) -> None:
        """Stop serving; frees sockets. Safe from another thread."""
        self._callers.put(None)
        if self._caller is not None:
            self._give_up(self._caller)

    def kill(self) -> None:
        """End as a killed process does: no farewell, everything forgotten (tests)."""
        self._listener.close()
        self.close()
        self.sever()
        for side in self._sides:
            side.cut()
        self.epochs.forget()

    def _release(self) -> None:
        self._listener.close()
        self._forget()
        for side in self._sides:
            side.close()
        while not self._callers.empty():
            left = self._callers.get()
            if left is not None:
                left.close()

    def _forget(self) -> None:
        """Leave nothing of one caller's model, sessions and peers to the next one."""
        self.sever()
        self.epochs.forget()

    def sever(self) -> None:
        """Close the connections to all peers: a run that goes on notices it at once."""
        self.wire.close()

    def _accepted(self, channel: Channel) -> None:
        kind = channel.peer.partition("/")[0]
        if kind == CALLER:
            channel.wait_forever()  # an idle device sleeps until the next order
            before = self._caller
            self._callers.put(channel)
            if before is not None:
                self._give_up(before)  # an engine dials anew when it hears nothing: the old connection is dead
        elif kind == SIDE:
            channel.wait_forever()
            channel.pace = None if channel.peer == SIDE_OF_ENGINE else self._pace
            self._sides = [s for s in self._sides if s.alive]
            self._sides.append(
                Side(channel, self.epochs, token=self._token, pace=self._pace, busy=self._busy, abort=self.abort)
            )
        else:
            channel.pace = self._pace
            with self._joined:
                self.wire.channels[channel.peer] = channel
                self._joined.notify_all()

    def _serve(self, caller: Channel) -> None:
        while True:
            try:
                frame = caller.read()
            except DeviceLost:
                return  # the caller has left
            if frame is None or frame.kind != Kind.CALL:
                continue
            with self._running:
                if caller.closed:  # an order that was given before the engine gave up waiting
                    return
                try:
                    carry_out(caller, frame.payload, self.TAKES, self)
                except DeviceLost:
                    return

    def _switch(self, order: messages.SwitchOrder) -> Answer:
        self.epochs.waiting(order.epoch)
        self._connect(order)
        return answers.Switched(copied_bytes=self.epochs.switch(order.epoch, order.sessions))

    def abort(self, epoch: int) -> dict[int, int]:
        """Stop whatever runs, and take back a switch to an epoch after this one, which others have not made.

        Returns:
            Of each session, the positions whose KV is certain to be here.
        """
        if self._caller is not None:
            self._give_up(self._caller)  # the engine dials anew
        self.sever()
        with self._running:
            return self.epochs.take_back(epoch)

    def _give_up(self, caller: Channel) -> None:
        """End a caller's orders: also the one that waits for peers, who may be dead."""
        caller.close()
        with self._joined:
            self._joined.notify_all()

    def _connect(self, order: messages.SwitchOrder) -> None:
        self.wire.channels = {p: c for p, c in self.wire.channels.items() if not c.closed}
        for peer, endpoint in order.dial.items():
            channel = dial(endpoint, me=self.device, peer=peer, token=self._token, deadline_s=self._deadline_s)
            channel.pace = self._pace
            self.wire.channels[peer] = channel
        expected, caller = set(order.expect), self._caller

        def settled() -> bool:
            return expected <= set(self.wire.channels) or caller is None or caller.closed

        with self._joined:
            if not self._joined.wait_for(settled, timeout=self._deadline_s) or not expected <= set(self.wire.channels):
                missing = sorted(expected - set(self.wire.channels))
                raise DeviceLost(f"{missing} did not connect within {self._deadline_s:g} s")
        here = (c.process for c in self.wire.channels.values())
        self.wire.waits = Waits(FreeCores(p for p in here if p is not None), spin_s=order.spin_s)

    def _decode(self, order: messages.DecodeOrder) -> Answer:
        assert self._caller is not None, "orders come from a caller"
        held = self._begin(order)
        loop = DecodeLoop(
            device=self.device,
            shard=held.shard,
            crossing=held.crossing,
            caller=self._caller,
            cache=held.cache(order.session, order.capacity),
            order=order,
            head_rows=held.head_rows,
        )
        with _telling_peers(held.crossing):
            return loop.run()

    def _step(self, order: messages.StepOrder) -> None:
        assert self._caller is not None, "orders come from a caller"
        held = self._begin(order)
        cache = held.cache(order.session, order.capacity)
        shape = (order.batch, order.new_tokens)
        if order.reorder is not None:
            cache.reorder(torch.tensor(order.reorder))
        if held.shard is None:
            return
        held.crossing.step = Step(order.session, order.epoch, order.attempt, order.position, order.keep)
        cache.begin(order.position, order.new_tokens)
        with _telling_peers(held.crossing):
            logits = held.shard.forward(
                cache=cache,
                tokens_BT=_ints(order.ids, shape),
                batch=order.batch,
                new_tokens=order.new_tokens,
                attention_mask=_ints(order.attention_mask, (order.batch, -1)),
                position_ids=_ints(order.position_ids, shape),
                keep=order.keep,
            )
        cache.written = order.position + order.new_tokens
        if logits.shape[-1]:
            send_tensor(self._caller, logits.float(), Kind.REPLY)

    def _begin(self, order: messages.DecodeOrder | messages.StepOrder) -> Holding:
        """What runs, with the wire ready for the frames of this attempt."""
        held, self.epochs.previous = self.epochs.running, None
        self.wire.begin(order.attempt)
        self.wire.epoch = order.epoch
        return held

    def _echo(self, order: messages.EchoOrder) -> Answer:
        held = self.epochs.running
        return probes.echo(held.crossing, order, held.epoch)

    TAKES: ClassVar[Takes] = {
        messages.HelloOrder: lambda self, _: answers.Done(),  # `serve` has forgotten what another engine left behind
        messages.SwitchOrder: _switch,
        messages.DecodeOrder: _decode,
        messages.StepOrder: _step,
        messages.EndOrder: lambda self, order: self.epochs.end(order.session),
        messages.EchoOrder: _echo,
        messages.SpeedsOrder: lambda self, order: speeds(cold_bytes=order.cold_bytes),
        messages.LeaveOrder: lambda self, _: self._forget(),
    }


@contextlib.contextmanager
def _telling_peers(crossing: Crossing) -> Iterator[None]:
    """Where a peer is lost, stop the others too; those that this device does not send to notice closed connections."""
    try:
        yield
    except DeviceLost:
        with contextlib.suppress(DeviceLost):
            crossing.stop()
        raise


def _ints(buffer: bytes | None, shape: tuple[int, int]) -> Tensor | None:
    if buffer is None:
        return None
    return torch.frombuffer(bytearray(buffer), dtype=torch.int64).reshape(shape)
