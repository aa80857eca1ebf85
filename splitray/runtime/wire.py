"""The data plane: frames over stream sockets between device processes, a Unix socket where both share a node.

A frame is a six-byte prefix, a small positional msgpack header and a raw tensor buffer; no pickle. Every
receive has a deadline. It knows peers by name and frames by key, and nothing of models or routes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import msgpack

from splitray.errors import DeviceLost

_PREFIX = struct.Struct("<IH")
_BUFFER_BYTES = 1 << 16
_HANDSHAKE_S = 10.0
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


class Channel:
    """One authenticated connection to a peer, used both ways."""

    def __init__(self, sock: socket.socket, peer: str, deadline_s: float) -> None:
        """Take over a connected socket; a receive without data for `deadline_s` raises DeviceLost."""
        self.sock, self.peer, self.deadline_s = sock, peer, deadline_s
        self.backlog: deque[memoryview] = deque()
        self.pending: deque[Frame] = deque()
        self.spin_s = 0.0
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _receive_timeout(sock, deadline_s)

    def send(self, header: tuple[Any, ...], payload: Payload = b"") -> int:
        """Send a frame without ever blocking; what the socket does not take waits in the backlog.

        Returns:
            Bytes of the whole frame. The payload must stay unchanged until the backlog is empty.
        """
        head = msgpack.packb(header)
        size = len(head) + len(payload)
        start = _PREFIX.pack(size, len(head)) + head
        total = _PREFIX.size + size
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
        while self.backlog:
            if not select.select([], [self.sock], [], self.deadline_s)[1]:
                raise DeviceLost(f"{self.peer} took nothing for {self.deadline_s:g} s")
            self.drain()

    def wait_forever(self) -> None:
        """Lift the receive deadline: an idle device sleeps until its caller's next order."""
        _receive_timeout(self.sock, 0.0)

    def read(self, *, block: bool = True) -> Frame | None:
        """The next frame, or None if `block` is False and no whole frame has come.

        Raises:
            DeviceLost: the peer closed the connection, or the deadline passed.
        """
        return self.pending.popleft() if self.pending else self._next(block)

    def take_in(self) -> None:
        """Keep a frame that has come for a later read."""
        frame = self._next(block=False)
        if frame is not None:
            self.pending.append(frame)

    def _next(self, block: bool) -> Frame | None:
        flags = 0 if block else socket.MSG_DONTWAIT
        spin_until = time.perf_counter() + self.spin_s if block and self.spin_s else 0.0
        while True:
            frame = self._parse()
            if frame is not None:
                return frame
            try:
                spin = spin_until and time.perf_counter() < spin_until
                count = self.sock.recv_into(self._view[self._end :], 0, socket.MSG_DONTWAIT if spin else flags)
            except BlockingIOError as error:
                if spin:
                    continue
                if not block:
                    return None
                raise DeviceLost(f"{self.peer} sent nothing for {self.deadline_s:g} s") from error
            except OSError as error:
                raise self._lost(error) from error
            if count == 0:
                raise self._lost("it closed the connection")
            self._end += count

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
        """Close the connection; harmless when it is closed already."""
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
        self._early = {k: v for k, v in self._early.items() if k[1].attempt >= attempt}

    def send(self, peer: str, header: tuple[Any, ...], payload: Payload = b"") -> None:
        """Send a frame to a peer; counts it."""
        traffic, channel = self.traffic, self.channels[peer]
        traffic.wire_bytes += channel.send(header, payload)
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
        """Close every channel."""
        for channel in self.channels.values():
            channel.close()


class Listener:
    """Accepts authenticated connections in a thread that sleeps in accept."""

    def __init__(self, *, token: bytes, host: str, deadline_s: float, accept: Callable[[Channel], None]) -> None:
        """Listen on an abstract Unix socket and a free TCP port of `host`; `accept` gets each new channel."""
        self._token, self._deadline_s, self._accept = token, deadline_s, accept
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"splitray-{secrets.token_hex(12)}"
        self._unix.bind(f"\0{name}")
        self._tcp = socket.create_server((host, 0))
        self._unix.listen(64)
        self.endpoint = Endpoint(name, host, self._tcp.getsockname()[1])
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="splitray-accept", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            ready = select.select([self._unix.fileno(), self._tcp.fileno(), self._wake], [], [])[0]
            if self._wake in ready:
                return
            for server in (self._unix, self._tcp):
                if server.fileno() not in ready:
                    continue
                sock, _ = server.accept()
                try:
                    channel = _answer(sock, self._token, self._deadline_s)
                except (OSError, EOFError, DeviceLost, ValueError, RuntimeError):
                    sock.close()  # a stranger, or a peer that went away: the next one is served
                    continue
                self._accept(channel)

    def close(self) -> None:
        """Stop accepting and free the addresses."""
        os.write(self._woken, b"x")
        self._thread.join()
        for sock in (self._unix, self._tcp):
            sock.close()
        os.close(self._wake)
        os.close(self._woken)


def dial(endpoint: Endpoint, *, me: str, peer: str, token: bytes, deadline_s: float) -> Channel:
    """Connect to a device: by its Unix socket if it is on this node, by TCP otherwise.

    Raises:
        DeviceLost: nobody answers there, or the cluster's token is not shared.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"\0{endpoint.unix}")
    except OSError:
        sock.close()
        try:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout=_HANDSHAKE_S)
        except OSError as error:
            raise DeviceLost(f"cannot reach {peer} at {endpoint.host}:{endpoint.port}: {error}") from error
        sock.settimeout(None)
    try:
        _receive_timeout(sock, _HANDSHAKE_S)
        _challenge(sock, token, first=False)
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        sock.close()
        raise DeviceLost(f"{peer} refused the connection (another cluster's token?): {error!r}") from error
    channel = Channel(sock, peer, deadline_s)
    channel.send((int(Kind.HELLO), 0, 0, 0, 0, 0, "", ()), me.encode())
    if channel.read() is None:
        raise DeviceLost(f"{peer} did not answer")
    return channel


def _answer(sock: socket.socket, token: bytes, deadline_s: float) -> Channel:
    _receive_timeout(sock, _HANDSHAKE_S)
    _challenge(sock, token, first=True)
    channel = Channel(sock, "", deadline_s)
    hello = channel.read()
    if hello is None or hello.kind != Kind.HELLO:
        raise ValueError("no hello")
    channel.peer = hello.payload.decode()
    channel.send((int(Kind.HELLO), 0, 0, 0, 0, 0, "", ()))
    return channel


def _challenge(sock: socket.socket, token: bytes, *, first: bool) -> None:
    """Both sides prove that they know the token (HMAC challenges of the standard library)."""
    connection = Connection(os.dup(sock.fileno()))
    steps = [deliver_challenge, answer_challenge]
    try:
        for step in steps if first else reversed(steps):
            step(connection, token)
    except Exception as error:  # AuthenticationError has no common base with OSError
        raise ValueError(str(error)) from error
    finally:
        connection.close()


def _receive_timeout(sock: socket.socket, seconds: float) -> None:
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, int((seconds - whole) * 1e6)))


def new_token() -> bytes:
    """A fresh secret for one cluster."""
    return secrets.token_bytes(32)
