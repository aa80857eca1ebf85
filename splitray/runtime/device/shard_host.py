"""The plain class behind each device process, thread or actor: loads a shard, connects to peers, runs orders.

Knows one device. What to hold and when to run comes from the caller; placement is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from typing import Any

import msgpack
import numpy as np
import psutil
import torch
from torch import Tensor

from splitray.errors import DeviceLost
from splitray.model.reading import StateDictSource
from splitray.model.surgery import weight_bytes
from splitray.runtime.device.busy import Busy
from splitray.runtime.device.crossing import Crossing, Junction, Step
from splitray.runtime.device.decode import DecodeLoop
from splitray.runtime.device.holding import Holding
from splitray.runtime.device.side import Side, fill
from splitray.runtime.device.speed import cold_ffn, speeds
from splitray.runtime.wire import Channel, Endpoint, Kind, Pace, Wire
from splitray.runtime.wire.listener import CALLER, DEADLINE_S, SIDE, SIDE_OF_ENGINE, Listener, dial
from splitray.runtime.wire.messages import DecodeOrder, StepOrder, error_to_plain
from splitray.runtime.wire.tensors import payload_of


class ShardHost:
    """Serves one device: listens for peers and for one caller at a time, and executes the caller's orders.

    `current` runs, `staged` waits for the switch, `previous` stays until the next run: peers may yet copy from it.
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
        self.device = device
        self.wire = Wire()
        self.pace = Pace()
        self.busy = Busy()
        self.junction = Junction()
        self.current: Holding | None = None
        self.staged: Holding | None = None
        self.previous: Holding | None = None
        self.ready: Holding | None = None
        """Slices for the case that another device is lost."""
        self.caller: Channel | None = None
        self.token, self.memory = token, source
        self._running = threading.Lock()  # held while an order of the caller is executed
        self._deadline_s = deadline_s
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
            self.caller, last = channel, channel.peer
            self._serve(channel)
            channel.close()
            if once:
                break
        self._release()

    def close(self) -> None:
        """Stop serving; frees sockets. Safe from another thread."""
        self._callers.put(None)
        if self.caller is not None:
            self._give_up(self.caller)

    def kill(self) -> None:
        """End as a killed process does: no farewell, everything forgotten (tests)."""
        self._listener.close()
        self.close()
        self.sever()
        for side in self._sides:
            side.cut()
        self.current = self.staged = self.previous = self.ready = None

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
        self.current = self.staged = self.previous = self.ready = None

    def sever(self) -> None:
        """Close the connections to all peers: a run that goes on notices it at once."""
        self.wire.close()

    def _accepted(self, channel: Channel) -> None:
        kind = channel.peer.partition("/")[0]
        if kind == CALLER:
            channel.wait_forever()  # an idle device sleeps until the next order
            before = self.caller
            self._callers.put(channel)
            if before is not None:
                self._give_up(before)  # an engine dials anew when it hears nothing: the old connection is dead
        elif kind == SIDE:
            channel.wait_forever()
            channel.pace = None if channel.peer == SIDE_OF_ENGINE else self.pace
            self._sides = [s for s in self._sides if s.alive]
            self._sides.append(Side(self, channel))
        else:
            channel.pace = self.pace
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
            order = msgpack.unpackb(bytes(frame.payload), strict_map_key=False)
            with self._running:
                if caller.closed:  # an order that was given before the engine gave up waiting
                    return
                try:
                    self._execute(order.pop("op"), order)
                except Exception as error:  # noqa: BLE001 - the process's boundary: every failure becomes a reply
                    try:
                        self._reply({"error": error_to_plain(error)})
                    except DeviceLost:
                        return

    def _execute(self, op: str, order: dict[str, Any]) -> None:
        match op:
            case "hello":  # what an engine before has left behind is gone now
                self._reply({})
            case "switch":
                self._reply(self._switch(order))
            case "decode":
                self._reply(self._decode(DecodeOrder(**order)))
            case "step":
                self._step(StepOrder(**order))
            case "end":  # of a run: nobody waits for an answer
                self._end(order["session"])
            case "stats":
                self._reply(self.stats())
            case "echo":
                self._reply(self._echo(**order))
            case "speeds":
                self._reply(speeds(**order))
            case "leave":
                self._forget()
            case _:
                raise RuntimeError(f"unknown order {op}")

    @property
    def held(self) -> Holding:
        """What runs."""
        if self.current is None:
            raise DeviceLost(f"{self.device} holds nothing: it was started anew")
        return self.current

    @property
    def crossing(self) -> Crossing:
        """This device's side of the exchange rule."""
        return self.held.crossing

    def _end(self, session: int) -> None:
        for holding in (self.current, self.staged, self.previous):
            if holding is not None:
                holding.caches.pop(session, None)

    def _reply(self, values: dict[str, Any], tensor: Tensor | None = None) -> None:
        assert self.caller is not None, "replies follow orders"
        head = msgpack.packb(values)
        if tensor is None:
            self.caller.send((int(Kind.REPLY), 0, 0, 0, 0, 0, "", ()), head)
        else:
            kept, payload = payload_of(tensor)
            name = str(kept.dtype).removeprefix("torch.")
            self.caller.send((int(Kind.REPLY), 0, 0, 0, 0, 0, name, tuple(kept.shape)), payload)
        self.caller.drain_fully()

    def _switch(self, order: dict[str, Any]) -> dict[str, Any]:
        """Let what is staged run, between two tokens; first copy what was written since it was staged."""
        staged = self.staged
        if staged is None or staged.epoch != order["epoch"]:
            raise DeviceLost(f"{self.device} has not staged epoch {order['epoch']}")
        self._connect(order)
        copied = sum(self.copy(staged, session) for session in order["sessions"])
        self.previous, self.current, self.staged = self.current, staged, None
        self.junction.lead_to(staged.crossing)
        return {"copied_bytes": copied}

    def copy(self, staged: Holding, session: dict[str, Any]) -> int:
        """Bring what is staged the KV of positions [start, stop), of this device itself and of others.

        Returns:
            Bytes that came over the wire.
        """
        number, start, stop = session["id"], session["start"], session["stop"]
        staged.cache(number, session["capacity"]).written = stop
        if self.current is not None and number in self.current.caches:
            staged.adopt(self.current, number)
        copied = 0
        for source in session["sources"]:
            here = source["device"] == self.device
            copied += fill(self if here else None, staged, source, number, start, stop, token=self.token)
        return copied

    def abort(self, epoch: int) -> dict[int, int]:
        """Stop whatever runs, and take back a switch to an epoch after this one, which others have not made.

        Returns:
            Of each session, the positions whose KV is certain to be here.
        """
        if self.caller is not None:
            self._give_up(self.caller)  # the engine dials anew
        self.sever()
        with self._running:
            before = self.previous
            if before is not None and before.epoch == epoch:
                self.current, self.previous = before, None
                self.junction.lead_to(before.crossing)
            return {n: c.written for n, c in self.current.caches.items()} if self.current else {}

    def _give_up(self, caller: Channel) -> None:
        """End a caller's orders: also the one that waits for peers, who may be dead."""
        caller.close()
        with self._joined:
            self._joined.notify_all()

    def _connect(self, order: dict[str, Any]) -> None:
        self.wire.channels = {p: c for p, c in self.wire.channels.items() if not c.closed}
        for peer, endpoint in order["dial"].items():
            channel = dial(
                Endpoint(*endpoint), me=self.device, peer=peer, token=self.token, deadline_s=self._deadline_s
            )
            channel.pace = self.pace
            self.wire.channels[peer] = channel
        expected, caller = set(order["await"]), self.caller

        def settled() -> bool:
            return expected <= set(self.wire.channels) or caller is None or caller.closed

        with self._joined:
            if not self._joined.wait_for(settled, timeout=self._deadline_s) or not expected <= set(self.wire.channels):
                missing = sorted(expected - set(self.wire.channels))
                raise DeviceLost(f"{missing} did not connect within {self._deadline_s:g} s")
        for channel in self.wire.channels.values():
            channel.spin_s = order["spin_s"]

    def _decode(self, order: DecodeOrder) -> dict[str, Any]:
        assert self.caller is not None, "orders come from a caller"
        held, self.previous = self.held, None
        self.wire.begin(order.attempt)
        self.wire.epoch = order.epoch
        loop = DecodeLoop(
            device=self.device,
            shard=held.shard,
            crossing=held.crossing,
            caller=self.caller,
            cache=held.cache(order.session, order.capacity),
            order=order,
            head_rows=held.head_rows,
        )
        try:
            return loop.run()
        except DeviceLost:
            self._abort()
            raise

    def _step(self, order: StepOrder) -> None:
        held, self.previous = self.held, None
        cache = held.cache(order.session, order.capacity)
        self.wire.begin(order.attempt)
        self.wire.epoch = order.epoch
        shape = (order.batch, order.new_tokens)
        if order.reorder is not None:
            cache.reorder(torch.tensor(order.reorder))
        if held.shard is None:
            return
        held.crossing.step = Step(order.session, order.epoch, order.attempt, order.position, order.keep)
        cache.begin(order.position, order.new_tokens)
        try:
            logits = held.shard.forward(
                cache=cache,
                tokens_BT=_ints(order.ids, shape),
                batch=order.batch,
                new_tokens=order.new_tokens,
                attention_mask=_ints(order.attention_mask, (order.batch, -1)),
                position_ids=_ints(order.position_ids, shape),
                keep=order.keep,
            )
        except DeviceLost:
            self._abort()
            raise
        cache.written = order.position + order.new_tokens
        if logits.shape[-1]:
            self._reply({}, logits.float())

    def _abort(self) -> None:
        with contextlib.suppress(DeviceLost):  # the other peers notice the closed connection themselves
            self.crossing.stop()

    def _echo(self, peer: str, attempt: int, size: int, rounds: int, first: bool, cold_bytes: int) -> dict[str, Any]:
        """Round trips with a peer of the frames that decoding sends: what the bench calls an exchange.

        With `cold_bytes` each side reads weights before it sends, so that the other one falls asleep, as it decodes.
        """
        row = np.zeros(size // 4, np.float32)
        work = cold_ffn(cold_bytes)[0] if cold_bytes else None
        self.wire.begin(attempt)
        self.wire.epoch = self.held.epoch
        times, worked = [], []

        def read_weights() -> None:
            if work is not None:
                begin = time.perf_counter()
                work()
                worked.append(time.perf_counter() - begin)

        for i in range(rounds):
            self.crossing.step = Step(0, self.wire.epoch, self.wire.attempt, i, 1)
            if first:
                read_weights()
            start = time.perf_counter()
            if first:
                self.crossing.send_row(peer, 0, row)
            row = self.crossing.receive_row(peer, 0)
            if not first:
                read_weights()
                self.crossing.send_row(peer, 0, row)
                self.wire.flush()  # a large frame does not leave at once, and nothing else waits for the last one
            times.append(time.perf_counter() - start)
        return {"round_trip_s": times, "worked_s": worked}

    def stats(self) -> dict[str, Any]:
        """Memory, bytes, CPU seconds."""
        process = psutil.Process()
        traffic = self.wire.traffic
        held = self.current
        shard = held.shard if held else None
        return {
            "weight_bytes": weight_bytes([h.shard for h in (held, self.ready) if h and h.shard]),
            "kv_bytes": sum(c.num_bytes for c in held.caches.values()) if held else 0,
            "checkpoint_bytes_read": shard.source.bytes_read if shard else 0,
            "rss_anon_bytes": rss_anon_bytes(),
            "cpu_s": time.process_time(),
            "pid": process.pid,
            "messages": traffic.messages,
            "payload_bytes": traffic.payload_bytes,
            "wire_bytes": traffic.wire_bytes,
            "dropped": self.wire.dropped,
            "lean": bool(shard and shard.lean),
        }


def rss_anon_bytes() -> int:
    """Anonymous memory of this process; mapped checkpoint files do not count (0 where the system does not tell)."""
    try:
        with open(f"/proc/{os.getpid()}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def _ints(buffer: bytes | None, shape: tuple[int, int]) -> Tensor | None:
    if buffer is None:
        return None
    return torch.frombuffer(bytearray(buffer), dtype=torch.int64).reshape(shape)
