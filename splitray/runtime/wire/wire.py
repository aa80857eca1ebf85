"""The data plane: frames over stream sockets between device processes, a Unix socket where both share a node.

A frame is a six-byte prefix, a small positional msgpack header and a raw tensor buffer; no pickle. Every
receive has a deadline. It knows peers by name and frames by key, and nothing of models or routes.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from splitray.errors import DeviceLost

_PREFIX = struct.Struct("<IH")
_BUFFER_BYTES = 1 << 16
_TCP_THIN_LINEAR_TIMEOUTS = 16  # of linux/tcp.h
Payload = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 0
    TENSOR = 1
    LAST = 2  # a token after which the run ends
    STOP = 3  # the run ends: passed on along the route
    CALL = 4
    REPLY = 5
    TOKEN = 6
    CANCEL = 7


def frame_start(header: tuple[Any, ...], payload_bytes: int) -> bytes:
    """Prefix and packed header of a frame; `header` is the fields of `Frame` without its payload."""
    head = msgpack.packb(header)
    return _PREFIX.pack(len(head) + payload_bytes, len(head)) + head


class Key(NamedTuple):
    """Where in a run a frame belongs; later keys compare greater."""

    attempt: int
    position: int
    boundary: int


class Frame(NamedTuple):
    """One received frame; `shape` and `dtype` describe the payload."""

    kind: int
    session: int
    epoch: int
    boundary: int
    position: int
    attempt: int
    dtype: str
    shape: tuple[int, ...]
    payload: bytearray

    @property
    def key(self) -> Key:
        """The frame's place in its run."""
        return Key(self.attempt, self.position, self.boundary)


class StopRun(Exception):  # noqa: N818 - control flow, not an error
    """A STOP frame of the current run arrived."""


@dataclass(slots=True)
class Traffic:
    """What one device has sent to other devices."""

    messages: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a device listens: an abstract Unix socket of its node, and a TCP address."""

    unix: str
    host: str
    port: int


class Pace:
    """A slower link than there is, emulated: whoever sends waits until the link would have taken the bytes.

    One for all connections of a device to others. For demonstrations and tests where links cannot be shaped.
    """

    def __init__(self) -> None:
        """As fast as it goes."""
        self.bytes_per_s = 0.0
        self._free_s = 0.0
        self._lock = threading.Lock()

    def wait(self, num_bytes: int) -> None:
        """Before bytes are sent."""
        if self.bytes_per_s:
            with self._lock:
                self._free_s = max(self._free_s, time.perf_counter()) + num_bytes / self.bytes_per_s
                until_s = self._free_s
            time.sleep(max(0.0, until_s - time.perf_counter()))


class Channel:
    """One authenticated connection to a peer, used both ways."""

    def __init__(self, sock: socket.socket, peer: str, deadline_s: float) -> None:
        """Take over a connected socket; a receive without data for `deadline_s` raises DeviceLost."""
        self.sock, self.peer, self.deadline_s = sock, peer, deadline_s
        self.backlog: deque[memoryview] = deque()
        self.pending: deque[Frame] = deque()
        self.spin_s = 0.0
        self.closed = False
        self.pace: Pace | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):  # Linux: after a short cut try again soon, not ever later
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_THIN_LINEAR_TIMEOUTS, 1)
        receive_timeout(sock, deadline_s)

    def send(self, header: tuple[Any, ...], payload: Payload = b"") -> int:
        """Send a frame; see `put`."""
        return self.put(frame_start(header, len(payload)), payload)

    def put(self, start: bytes, payload: Payload) -> int:
        """Send a frame without ever blocking; what the socket does not take waits in the backlog.

        Args:
            start: everything before the payload, from `frame_start`.
            payload: must stay unchanged until the backlog is empty.

        Returns:
            Bytes of the whole frame.
        """
        total = len(start) + len(payload)
        if self.pace is not None:
            self.pace.wait(total)
        sent = 0
        if not self.backlog:
            try:
                sent = self.sock.sendmsg((start, payload), (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise self._lost(error) from error
            if sent == total:
                return total
        for part in (memoryview(start), memoryview(payload)):
            if sent < len(part):
                self.backlog.append(part[sent:])
            sent = max(0, sent - len(part))
        return total

    def drain(self) -> None:
        """Push what the socket takes of the backlog, without blocking."""
        while self.backlog:
            try:
                sent = self.sock.send(self.backlog[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from error
            if sent == len(self.backlog[0]):
                self.backlog.popleft()
            else:
                self.backlog[0] = self.backlog[0][sent:]

    def drain_fully(self) -> None:
        """Wait until the backlog is sent.

        Raises:
            DeviceLost: the peer took nothing before the deadline, or is gone.
        """
        if not self.backlog:
            return
        writable = select.poll()  # select.select refuses descriptors from 1024 on
        writable.register(self.sock, select.POLLOUT)
        while self.backlog:
            if not writable.poll(self.deadline_s * 1000):
                raise DeviceLost(f"{self.peer} took nothing for {self.deadline_s:g} s")
            self.drain()

    def wait_forever(self) -> None:
        """Lift the receive deadline: an idle device sleeps until its caller's next order."""
        receive_timeout(self.sock, 0.0)

    def read(self, *, block: bool = True) -> Frame | None:
        """The next frame, or None if `block` is False and no whole frame has come.

        Raises:
            DeviceLost: the peer closed the connection, or the deadline passed.
        """
        return self.pending.popleft() if self.pending else self._next(block)

    def read_expected(self, start: bytes, payload_bytes: int) -> memoryview | None:
        """Wait for data; the payload, if what came is one whole frame with this very start.

        Anything else returns None and stays for `read`. The hot path of decoding: nothing is unpacked or copied,
        and the payload is valid until the next read.
        """
        if self.pending or self._end:
            return None
        self._fill(block=True)
        total = len(start) + payload_bytes
        if self._end != total or not self._buffer.startswith(start):
            return None
        self._end = 0
        return self._view[len(start) : total]

    def take_in(self) -> None:
        """Keep a frame that has come for a later read."""
        frame = self._next(block=False)
        if frame is not None:
            self.pending.append(frame)

    def _next(self, block: bool) -> Frame | None:
        while True:
            frame = self._parse()
            if frame is not None or not self._fill(block):
                return frame

    def _fill(self, block: bool) -> bool:
        """Take in what has come; False if `block` is False and nothing has."""
        flags = 0 if block else socket.MSG_DONTWAIT
        spin_until = time.perf_counter() + self.spin_s if block and self.spin_s else 0.0
        while True:
            spin = spin_until and time.perf_counter() < spin_until
            try:
                count = self.sock.recv_into(self._view[self._end :], 0, socket.MSG_DONTWAIT if spin else flags)
            except BlockingIOError as error:
                if spin:
                    continue
                if not block:
                    return False
                raise DeviceLost(f"{self.peer} sent nothing for {self.deadline_s:g} s") from error
            except OSError as error:
                raise self._lost(error) from error
            if count == 0:
                raise self._lost("it closed the connection")
            self._end += count
            return True

    def _parse(self) -> Frame | None:
        have = self._end - self._start
        if have < _PREFIX.size:
            self._room(_PREFIX.size)
            return None
        size, head = _PREFIX.unpack_from(self._buffer, self._start)
        total = _PREFIX.size + size
        if have < total:
            self._room(total)
            return None
        at = self._start + _PREFIX.size
        header = msgpack.unpackb(self._view[at : at + head], use_list=False)
        payload = bytearray(self._view[at + head : self._start + total])
        self._start += total
        if self._start == self._end:
            self._start = self._end = 0
        return Frame(*header, payload)  # type: ignore[call-arg]

    def _room(self, total: int) -> None:
        if self._start + total <= len(self._buffer):
            return
        kept = bytes(self._view[self._start : self._end])
        if total > len(self._buffer):
            self._buffer = bytearray(total + _BUFFER_BYTES)
            self._view = memoryview(self._buffer)
        self._view[: len(kept)] = kept
        self._start, self._end = 0, len(kept)

    def _lost(self, reason: object) -> DeviceLost:
        return DeviceLost(f"lost {self.peer}: {reason}")

    def close(self) -> None:
        """Close the connection; harmless when it is closed already. A thread that waits on it wakes."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Wire:
    """One device's channels to its peers."""

    def __init__(self) -> None:
        """Start without peers."""
        self.channels: dict[str, Channel] = {}
        self.traffic = Traffic()
        self.dropped = 0
        self.epoch = 0
        self.attempt = 0
        self._early: dict[tuple[str, Key], Frame] = {}
        self._backlogged = False

    def begin(self, attempt: int) -> None:
        """Start a run: frames of earlier attempts are dropped from now on."""
        self.attempt = attempt
        self._backlogged = any(c.backlog for c in self.channels.values())
        self._early = {k: v for k, v in self._early.items() if k[1].attempt >= attempt}

    def send(self, peer: str, header: tuple[Any, ...], payload: Payload = b"") -> None:
        """Send a frame to a peer; counts it."""
        self.put(peer, frame_start(header, len(payload)), payload)

    def put(self, peer: str, start: bytes, payload: Payload) -> None:
        """Send a frame whose start is packed already; counts it."""
        traffic, channel = self.traffic, self.channels[peer]
        traffic.wire_bytes += channel.put(start, payload)
        if channel.backlog:
            self._backlogged = True
        traffic.payload_bytes += len(payload)
        traffic.messages += 1

    def tell(self, peer: str, header: tuple[Any, ...]) -> None:
        """Send a frame without payload that is control and not counted."""
        channel = self.channels[peer]
        channel.send(header)
        self._backlogged = self._backlogged or bool(channel.backlog)

    def receive(self, peer: str, key: Key) -> Frame:
        """Wait for the peer's frame of this key; stale and repeated frames are dropped, early ones kept.

        Raises:
            StopRun: the peer passed on the end of this run.
            DeviceLost: the peer is gone or silent for longer than the deadline.
        """
        if self._early:
            early = self._early.pop((peer, key), None)
            if early is not None:
                return early
        channel = self.channels[peer]
        give_up = 0.0
        while True:
            if self._backlogged and not channel.pending:
                give_up = give_up or time.monotonic() + channel.deadline_s
                self._pump(give_up, peer)
                continue
            frame = channel.read()
            assert frame is not None, "a blocking read returns a frame"
            came = (frame.attempt, frame.position, frame.boundary)
            if came == key and frame.epoch == self.epoch and frame.kind != Kind.STOP:
                return frame
            if frame.attempt == self.attempt and frame.kind == Kind.STOP:
                raise StopRun
            if frame.epoch != self.epoch or came < key or frame.kind == Kind.STOP:
                self.dropped += 1
            else:
                self._early[(peer, frame.key)] = frame

    def receive_expected(self, peer: str, key: Key, start: bytes, payload_bytes: int) -> Payload:
        """The payload of the peer's frame of this key, quicker if it comes alone and starts as expected.

        It is valid until the next receive from this peer. Raises as `receive` does.
        """
        if not self._early and not self._backlogged:
            payload = self.channels[peer].read_expected(start, payload_bytes)
            if payload is not None:
                return payload
        return self.receive(peer, key).payload

    def flush(self) -> None:
        """Wait until every backlog is on its way, taking in what comes (so that two flushes cannot lock)."""
        give_up = 0.0
        while self._backlogged:
            give_up = give_up or time.monotonic() + min(c.deadline_s for c in self.channels.values())
            self._pump(give_up, "a peer")

    def _pump(self, give_up: float, peer: str) -> None:
        poll = select.poll()
        by_fd = {c.sock.fileno(): c for c in self.channels.values()}
        for fd, channel in by_fd.items():
            poll.register(fd, select.POLLIN | (select.POLLOUT if channel.backlog else 0))
        left = give_up - time.monotonic()
        ready = poll.poll(max(0.0, left) * 1000)
        if not ready and left <= 0:
            raise DeviceLost(f"{peer} took or sent nothing before the deadline")
        for fd, events in ready:
            channel = by_fd[fd]
            if events & select.POLLOUT:
                channel.drain()
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                channel.take_in()
        self._backlogged = any(c.backlog for c in self.channels.values())

    def close(self) -> None:
        """Close every channel; safe from another thread."""
        for channel in list(self.channels.values()):
            channel.close()


def receive_timeout(sock: socket.socket, seconds: float) -> None:
    """Let a blocking receive give up after `seconds` (0: never)."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, int((seconds - whole) * 1e6)))


def new_token() -> bytes:
    """A fresh secret for one cluster."""
    return secrets.token_bytes(32)
