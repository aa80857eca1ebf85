"""The data plane: one device's frames to and from its peers, over a Unix socket where both share a node.

It knows peers by name and frames by key, and nothing of models or routes.
"""

import select
import time
from dataclasses import dataclass

from splitray.errors import DeviceLost
from splitray.runtime.wire.connection import Channel
from splitray.runtime.wire.frames import Frame, Header, Kind, Payload, frame_start
from splitray.runtime.wire.free_cores import FreeCores
from splitray.runtime.wire.waits import Waits


class StopRun(Exception):  # noqa: N818 - control flow, not an error
    """A STOP frame of the current run arrived."""


@dataclass(slots=True)
class Traffic:
    """What one device has sent to other devices."""

    messages: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0


class Wire:
    """One device's channels to its peers."""

    def __init__(self) -> None:
        """Start without peers."""
        self.channels: dict[str, Channel] = {}
        self.traffic = Traffic()
        self.dropped = 0
        self.epoch = 0
        self.attempt = 0
        self.waits = Waits(FreeCores())
        self._early: dict[tuple[str, tuple[int, int, int]], Frame] = {}
        self._backlogged = False

    def begin(self, attempt: int) -> None:
        """Start a run: frames of earlier attempts are dropped from now on."""
        self.attempt = attempt
        self.waits.forget()
        self._backlogged = any(c.backlog for c in self.channels.values())
        self._early = {k: v for k, v in self._early.items() if k[1][0] >= attempt}

    def send(self, peer: str, fields: Header, payload: Payload = b"") -> None:
        """Send a frame to a peer; counts it."""
        self.put(peer, frame_start(fields, len(payload)), payload)

    def put(self, peer: str, start: bytes, payload: Payload) -> None:
        """Send a frame whose start is packed already; counts it."""
        traffic, channel = self.traffic, self.channels[peer]
        traffic.wire_bytes += channel.put(start, payload)
        if channel.backlog:
            self._backlogged = True
        traffic.payload_bytes += len(payload)
        traffic.messages += 1

    def tell(self, peer: str, fields: Header) -> None:
        """Send a frame without payload that is control and not counted."""
        channel = self.channels[peer]
        channel.send(fields)
        self._backlogged = self._backlogged or bool(channel.backlog)

    def receive(self, peer: str, key: tuple[int, int, int]) -> Frame:
        """Wait for the peer's frame of this `Key`; stale and repeated frames are dropped, early ones kept.

        Raises:
            StopRun: the peer passed on the end of this run.
            DeviceLost: the peer is gone or silent for longer than the deadline.
        """
        if self._early:
            early = self._early.pop((peer, key), None)
            if early is not None:
                return early
        channel = self.channels[peer]
        if not self._backlogged:
            self.waits.begin(channel, key[2])
        frame = self._receive(channel, key)
        self.waits.end()
        return frame

    def _receive(self, channel: Channel, key: tuple[int, int, int]) -> Frame:
        peer, give_up = channel.peer, 0.0
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

    def receive_expected(self, peer: str, key: tuple[int, int, int], start: bytes, payload_bytes: int) -> Payload:
        """The payload of the peer's frame of this key, quicker if it comes alone and starts as expected.

        It is valid until the next receive from this peer. Raises as `receive` does.
        """
        if self._early or self._backlogged:
            return self.receive(peer, key).payload
        channel = self.channels[peer]
        self.waits.begin(channel, key[2])
        payload: Payload | None = channel.read_expected(start, payload_bytes)
        if payload is None:
            payload = self._receive(channel, key).payload
        self.waits.end()
        return payload

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
