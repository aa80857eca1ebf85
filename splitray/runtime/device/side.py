"""What a device answers while a run goes on: staging of the next placement, copies of KV, checkpoints, a sign of life.

One thread for each engine or device that has dialled; the run has its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import msgpack
import torch
from torch import Tensor

from splitray.errors import DeviceLost, InputError
from splitray.model.kv_cache import KvPiece
from splitray.model.source import Checkpoint
from splitray.runtime.checkpoint import Saved, Store
from splitray.runtime.device.holding import Holding, build, pieces
from splitray.runtime.device.lending import lend
from splitray.runtime.wire import Channel, Endpoint, Kind
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import LoadOrder, error_from_plain, error_to_plain
from splitray.runtime.wire.tensors import payload_of, tensor_of

if TYPE_CHECKING:
    from splitray.runtime.device.shard_host import ShardHost

_IN_FLIGHT_BYTES = 1 << 17
_COPY_S = 20.0  # of silence from a device that is to send KV
_HEADER = (0, 0, 0, 0, 0, "", ())


class Side:
    """Serves one such connection."""

    def __init__(self, host: ShardHost, channel: Channel) -> None:
        """Start at once."""
        self._host, self._channel = host, channel
        self._opened: dict[str, Checkpoint] = {}
        # Copies share links with the run: what waits in a socket's buffer delays every token behind it.
        channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _IN_FLIGHT_BYTES)
        self._thread = threading.Thread(target=self._serve, name=f"splitray-side-{host.device}", daemon=True)
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
                order = msgpack.unpackb(bytes(frame.payload), strict_map_key=False)
                try:
                    self._execute(order.pop("op"), order)
                except Exception as error:  # noqa: BLE001 - the process's boundary: every failure becomes a reply
                    self._reply({"error": error_to_plain(error)})
            except (DeviceLost, OSError):
                self._channel.close()
                return

    def _execute(self, op: str, order: dict[str, Any]) -> None:
        host = self._host
        match op:
            case "ping":
                self._reply({"epoch": host.current.epoch if host.current else None})
            case "pace":
                host.pace.bytes_per_s = order["bytes_per_s"]
                self._reply({})
            case "load":
                self._reply(host.busy.look())
            case "reach":
                self._reply({"unreached": _unreached(host, order)})
            case "probe":
                self._reply(_probed(host, order))
            case "bounce":
                self._send(torch.zeros(order["bytes"], dtype=torch.uint8))
                self._reply({})
            case "abort":
                positions = host.abort(order["epoch"])
                self._reply({"epoch": host.current.epoch if host.current else None, "positions": positions})
            case "stage":
                self._reply(self._stage(order))
            case "ready":
                load = LoadOrder.from_plain(order["load"])
                host.ready = build(load, device=host.device, wire=host.wire, junction=host.junction,
                                   memory=host.memory, old=host.current, lenders=order["lenders"],
                                   token=host.token)  # fmt: skip
                self._reply(host.stats())
            case "kv":
                self._kv(order)
            case "weights":
                values, tensors = lend(order, self._opened)
                for tensor in tensors:
                    self._send(tensor)
                self._reply(values)
            case "checkpoint":
                self._reply(self._checkpoint(order))
            case _:
                raise RuntimeError(f"unknown order {op}")

    def _stage(self, order: dict[str, Any]) -> dict[str, Any]:
        """Read the slices of the next placement and copy the KV that there is; what runs goes on."""
        host, started = self._host, time.monotonic()
        load = LoadOrder.from_plain(order["load"])
        host.staged = None
        staged = build(
            load,
            device=host.device,
            wire=host.wire,
            junction=host.junction,
            memory=host.memory,
            old=host.current,
            ready=host.ready,
            lenders=order["lenders"],
            token=host.token,
        )
        copied, valid, copying = 0, {}, time.monotonic()
        for session in order["sessions"]:
            copied += host.copy(staged, session)
            valid[session["id"]] = session["stop"]
            if session["lost"]:
                number, files = session["id"], [Saved.from_plain(f) for f in session["files"]]
                valid[number] = 0
                if files:
                    with contextlib.suppress(InputError):  # this device has no way to the store
                        store, wanted = Store(session["store"]), list(pieces(session["lost"]))
                        valid[number] = store.restore(staged, number, wanted, files)
                staged.caches[number].written = valid[number]
        copied_s = time.monotonic() - copying
        host.staged = staged
        return {
            "fingerprint": staged.source.fingerprint(),  # type: ignore[attr-defined]
            "load_s": time.monotonic() - started,
            "copied_bytes": copied,
            "copy_s": copied_s,
            "valid": valid,
            **host.stats(),
            "weight_bytes": staged.shard.weight_bytes if staged.shard else 0,
            "checkpoint_bytes_read": staged.source.bytes_read,
        }

    def _kv(self, order: dict[str, Any]) -> None:
        """Send keys and values of pieces of one session, one frame each."""
        holding = self._holding(order["epoch"])
        for piece in pieces(order["pieces"]):
            kv = holding.read(order["session"], piece, order["start"], order["stop"])
            for tensor in kv or ():
                self._send(tensor)
        self._reply({})

    def _holding(self, epoch: int) -> Holding:
        for holding in (self._host.current, self._host.previous):
            if holding is not None and holding.epoch == epoch:
                return holding
        raise DeviceLost(f"{self._host.device} has nothing of epoch {epoch} any more")

    def _checkpoint(self, order: dict[str, Any]) -> dict[str, Any]:
        holding, began = self._holding(order["epoch"]), time.thread_time()
        saved = Store(order["store"]).save(holding, order["session"], self._host.device, order["start"], order["stop"])
        file = {k: getattr(saved, k) for k in Saved.__slots__} if saved else None  # type: ignore[attr-defined]
        return {"file": file, "cpu_s": time.thread_time() - began}

    def _send(self, tensor: Tensor) -> None:
        kept, payload = payload_of(tensor)
        name = str(kept.dtype).removeprefix("torch.")
        self._channel.send((int(Kind.TENSOR), 0, 0, 0, 0, 0, name, tuple(kept.shape)), payload)
        self._channel.drain_fully()

    def _reply(self, values: dict[str, Any]) -> None:
        self._channel.send((int(Kind.REPLY), *_HEADER), msgpack.packb(values))
        self._channel.drain_fully()


def fill(
    here: ShardHost | None, staged: Holding, source: dict[str, Any], session: int, start: int, stop: int, *,
    token: bytes,
) -> int:  # fmt: skip
    """Copy pieces of a session's KV, positions [start, stop), into what is staged: from this device or another.

    Returns:
        Bytes that came over the wire.
    """
    if start >= stop:
        return 0
    if here is not None:
        current = here.current
        if current is None:
            raise DeviceLost(f"{here.device} holds nothing any more")
        for piece in pieces(source["pieces"]):
            kv = current.read(session, piece, start, stop)
            if kv is not None:
                staged.write(session, piece, start, *kv)
        return 0
    channel = dial(Endpoint(*source["endpoint"]), me="side/kv", peer=source["device"], token=token, deadline_s=_COPY_S)
    try:
        return _fetch(channel, staged, source, session, start, stop)
    finally:
        channel.close()


def _fetch(channel: Channel, staged: Holding, source: dict[str, Any], session: int, start: int, stop: int) -> int:
    order = {"op": "kv", "session": session, "epoch": source["epoch"], "pieces": source["pieces"],
             "start": start, "stop": stop}  # fmt: skip
    channel.send((int(Kind.CALL), *_HEADER), msgpack.packb(order))
    channel.drain_fully()
    wanted: list[KvPiece] = list(pieces(source["pieces"]))
    got: list[Tensor] = []
    copied = 0
    while True:
        frame = channel.read()
        assert frame is not None, "a blocking read returns a frame"
        if frame.kind == Kind.REPLY:
            values = msgpack.unpackb(bytes(frame.payload))
            if "error" in values:
                raise error_from_plain(values["error"], source["device"])
            return copied
        got.append(tensor_of(frame))
        copied += len(frame.payload)
        if len(got) == 2:
            staged.write(session, wanted.pop(0), start, *got)
            got.clear()


def _unreached(host: ShardHost, order: dict[str, Any]) -> list[str]:
    """Peers that do not answer a new connection."""
    failed = []
    for peer, endpoint in order["peers"].items():
        try:
            dial(Endpoint(*endpoint), me="side/probe", peer=peer, token=host.token, deadline_s=order["within_s"],
                 within_s=order["within_s"]).close()  # fmt: skip
        except DeviceLost:
            failed.append(peer)
    return failed


def _probed(host: ShardHost, order: dict[str, Any]) -> dict[str, float]:
    """Time a round trip to a peer, and some bytes each way, over a connection of its own."""
    size = order["bytes"]
    channel = dial(Endpoint(*order["endpoint"]), me="side/probe", peer=order["peer"], token=host.token,
                   deadline_s=order["within_s"], within_s=order["within_s"])  # fmt: skip
    channel.pace = host.pace

    def timed(there: int, back: int) -> float:
        began = time.perf_counter()
        asked = msgpack.packb({"op": "bounce", "bytes": back, "filling": bytes(there)})
        channel.send((int(Kind.CALL), *_HEADER), asked)
        channel.drain_fully()
        while (frame := channel.read()) is not None and frame.kind != Kind.REPLY:
            pass
        return time.perf_counter() - began

    try:
        rtt_s = min(timed(1, 1) for _ in range(3))
        there_s, back_s = (max(1e-6, timed(*sizes) - rtt_s) for sizes in ((size, 1), (1, size)))
    finally:
        channel.close()
    return {"rtt_s": rtt_s, "there_bytes_per_s": size / there_s, "back_bytes_per_s": size / back_s}
