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

from splitray.errors import DeviceLost, InputError
from splitray.model.kv_cache import KvCache, sliding_windows
from splitray.model.reading import StateDictSource, read_config
from splitray.model.source import Checkpoint
from splitray.model.surgery import Shard
from splitray.runtime.coded import CodedCrossing
from splitray.runtime.crossing import Crossing, Step, payload_of
from splitray.runtime.decode import DecodeLoop
from splitray.runtime.listener import Listener, dial
from splitray.runtime.messages import DecodeOrder, LoadOrder, StepOrder, error_to_plain
from splitray.runtime.speed import cold_ffn, speeds
from splitray.runtime.wire import Channel, Endpoint, Kind, Wire

CALLER = "caller"
DEADLINE_S = 60.0


class ShardHost:
    """Serves one device: listens for peers and for one caller at a time, and executes the caller's orders."""

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
        self.shard: Shard | None = None
        self.caller: Channel | None = None
        self._token, self._deadline_s, self._source = token, deadline_s, source
        self._callers: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._joined = threading.Condition()
        self._caches: dict[int, KvCache] = {}
        self._listener = Listener(token=token, host=host, deadline_s=deadline_s, accept=self._accepted)

    @property
    def endpoint(self) -> Endpoint:
        """Where peers and the caller find this device."""
        return self._listener.endpoint

    def serve(self, *, once: bool = False) -> None:
        """Execute callers' orders until `close` (or until the first caller leaves, if `once`)."""
        while (channel := self._callers.get()) is not None:
            self.caller = channel
            self._serve(channel)
            channel.close()
            self._forget()
            if once:
                break
        self._release()

    def close(self) -> None:
        """Stop serving; frees sockets. Safe from another thread."""
        self._callers.put(None)
        if self.caller is not None:
            self.caller.close()

    def _release(self) -> None:
        self._listener.close()
        self._forget()
        while not self._callers.empty():
            left = self._callers.get()
            if left is not None:
                left.close()

    def _forget(self) -> None:
        """Leave nothing of one caller's model, sessions and peers to the next one."""
        self.wire.close()
        self.wire.channels.clear()
        self._caches.clear()
        self.shard = None

    def _accepted(self, channel: Channel) -> None:
        if channel.peer == CALLER:
            channel.wait_forever()  # an idle device sleeps until the next order
            self._callers.put(channel)
            return
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
            try:
                self._execute(order.pop("op"), order)
            except Exception as error:  # noqa: BLE001 - the process's boundary: every failure becomes a reply
                try:
                    self._reply({"error": error_to_plain(error)})
                except DeviceLost:
                    return

    def _execute(self, op: str, order: dict[str, Any]) -> None:
        match op:
            case "load":
                self._reply(self._load(LoadOrder.from_plain(order)))
            case "connect":
                self._connect(order)
                self._reply({})
            case "decode":
                self._reply(self._decode(DecodeOrder(**order)))
            case "step":
                self._step(StepOrder(**order))
            case "forget":
                self._caches.pop(order["session"], None)
                self._reply({})
            case "stats":
                self._reply(self._stats())
            case "echo":
                self._reply(self._echo(**order))
            case "speeds":
                self._reply(speeds(**order))
            case _:
                raise RuntimeError(f"unknown order {op}")

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

    def _load(self, order: LoadOrder) -> dict[str, Any]:
        source = self._source or Checkpoint(order.model_path)
        self.order = order
        if order.core is not None:
            os.sched_setaffinity(0, {order.core})  # of this thread: the one that will run every order
        kind = Crossing if order.route.codec == "none" else CodedCrossing
        self.crossing = kind(self.device, order.route, order.arch, self.wire)
        self.crossing.torch_device = torch.device(order.torch_device)
        self._head_rows = {
            device: torch.cat([torch.arange(r.start, r.stop) for r in rows]) for device, rows in order.head_rows.items()
        }
        started = time.monotonic()
        self._windows: tuple[bool, ...] = ()
        if order.spec is not None:
            config = self._source.config if self._source else read_config(order.model_path)
            if order.torch_device.startswith("cuda") and not torch.cuda.is_available():
                raise InputError(
                    f"torch_device of {self.device}",
                    expected="a CUDA device on that node",
                    actual="none",
                    remedy="set torch_device: cpu",
                )
            self.shard = Shard(
                config=config,
                arch=order.arch,
                layout=order.layout,
                spec=order.spec,
                source=source,
                exchange=self.crossing,
                torch_device=order.torch_device,
            )
            if order.lean:
                self.shard.make_lean()
            self._windows = sliding_windows(config, order.arch.num_layers)
        return {"fingerprint": source.fingerprint(), "load_s": time.monotonic() - started, **self._stats()}

    def _connect(self, order: dict[str, Any]) -> None:
        for peer, endpoint in order["dial"].items():
            channel = dial(
                Endpoint(*endpoint), me=self.device, peer=peer, token=self._token, deadline_s=self._deadline_s
            )
            self.wire.channels[peer] = channel
        expected = set(order["await"])
        with self._joined:
            if not self._joined.wait_for(lambda: expected <= set(self.wire.channels), timeout=self._deadline_s):
                missing = sorted(expected - set(self.wire.channels))
                raise DeviceLost(f"{missing} did not connect within {self._deadline_s:g} s")
        for channel in self.wire.channels.values():
            channel.spin_s = order["spin_s"]

    def _cache(self, session: int, capacity: int) -> KvCache:
        cache = self._caches.get(session)
        if cache is None:
            layers = self.order.arch.num_layers
            cache = KvCache(num_layers=layers, windows=self._windows or (False,) * layers, capacity=capacity)
            self._caches[session] = cache
        return cache

    def _decode(self, order: DecodeOrder) -> dict[str, Any]:
        assert self.caller is not None, "orders come from a caller"
        self.wire.begin(order.attempt)
        self.wire.epoch = order.epoch
        loop = DecodeLoop(
            device=self.device,
            shard=self.shard,
            crossing=self.crossing,
            caller=self.caller,
            cache=self._cache(order.session, order.capacity),
            order=order,
            head_rows=self._head_rows,
        )
        try:
            report = loop.run()
        except DeviceLost:
            self._abort()
            raise
        finally:
            self._caches.pop(order.session, None)
        return report

    def _step(self, order: StepOrder) -> None:
        cache = self._cache(order.session, order.capacity)
        self.wire.begin(order.attempt)
        self.wire.epoch = order.epoch
        shape = (order.batch, order.new_tokens)
        if order.reorder is not None:
            cache.reorder(torch.tensor(order.reorder))
        if self.shard is None:
            return
        self.crossing.step = Step(order.session, order.epoch, order.attempt, order.position, order.keep)
        cache.begin(order.position, order.new_tokens)
        try:
            logits = self.shard.forward(
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
        if logits.shape[-1]:
            self._reply({}, logits.float())

    def _abort(self) -> None:
        with contextlib.suppress(DeviceLost):  # the other peers notice the closed connection themselves
            self.crossing.stop()

    def _echo(self, peer: str, size: int, rounds: int, first: bool, cold_bytes: int) -> dict[str, Any]:
        """Round trips with a peer of the frames that decoding sends: what the bench calls an exchange.

        With `cold_bytes` each side reads weights before it sends, so that the other one falls asleep, as it decodes.
        """
        row = np.zeros(size // 4, np.float32)
        work = cold_ffn(cold_bytes)[0] if cold_bytes else None
        self.wire.begin(self.wire.attempt + 1)
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

    def _stats(self) -> dict[str, Any]:
        process = psutil.Process()
        traffic = self.wire.traffic
        shard = self.shard
        return {
            "weight_bytes": shard.weight_bytes if shard else 0,
            "kv_bytes": sum(c.num_bytes for c in self._caches.values()),
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
