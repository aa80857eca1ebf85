"""One connection between two processes: frames out without ever blocking, frames in with a deadline."""

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque

import msgpack

from splitray.errors import DeviceLost
from splitray.runtime.wire.frames import PREFIX, Frame, Header, Payload, frame_start

_BUFFER_BYTES = 1 << 16
_JOINED_BYTES = 1 << 14  # up to here a copy is quicker than a list of two buffers
_AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_TCP_THIN_LINEAR_TIMEOUTS = 16  # of linux/tcp.h


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
        self.process: int | None = None
        """That of the peer, where it is on this machine."""
        self.backlog: deque[memoryview] = deque()
        self.pending: deque[Frame] = deque()
        self.closed = False
        self.pace: Pace | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.process = _CREDENTIALS.unpack(credentials)[0]
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):  # Linux: after a short cut try again soon, not ever later
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_THIN_LINEAR_TIMEOUTS, 1)
        receive_timeout(sock, deadline_s)

    def send(self, fields: Header, payload: Payload = b"") -> int:
        """Send a frame; see `put`."""
        return self.put(frame_start(fields, len(payload)), payload)

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
                if total <= _JOINED_BYTES:
                    sent = self.sock.send(b"".join((start, payload)), _AT_ONCE)
                else:
                    sent = self.sock.sendmsg((start, payload), (), _AT_ONCE)
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
                sent = self.sock.send(self.backlog[0], _AT_ONCE)
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

    def has_come(self) -> bool:
        """Whether there is something to read, were it the end of the connection."""
        return bool(self.pending or self._end or self._poll.poll(0))

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
        try:
            count = self.sock.recv_into(self._view[self._end :], 0, 0 if block else socket.MSG_DONTWAIT)
        except BlockingIOError as error:
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
        if have < PREFIX.size:
            self._room(PREFIX.size)
            return None
        size, head = PREFIX.unpack_from(self._buffer, self._start)
        total = PREFIX.size + size
        if have < total:
            self._room(total)
            return None
        at = self._start + PREFIX.size
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


def receive_timeout(sock: socket.socket, seconds: float) -> None:
    """Let a blocking receive give up after `seconds` (0: never)."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, int((seconds - whole) * 1e6)))
