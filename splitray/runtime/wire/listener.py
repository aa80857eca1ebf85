"""How device processes find and trust each other: a listener on every device, a dial from one side of each pair.

Both sides prove that they know the cluster's token. Knows nothing of what the channels are used for.
"""

import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]

from splitray.errors import DeviceLost
from splitray.runtime.wire.connection import Channel, receive_timeout
from splitray.runtime.wire.endpoint import Endpoint
from splitray.runtime.wire.frames import Kind, header

CALLER, SIDE = "caller", "side"
"""Names under which an engine dials: for runs, and for what must be heard while a run goes on."""
SIDE_OF_ENGINE = f"{SIDE}/engine"
DEADLINE_S = 60.0  # of silence after which a peer counts as lost
_HANDSHAKE_S = 10.0


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
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._serve, name="splitray-accept", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        waiting = select.poll()  # select.select refuses descriptors from 1024 on
        for source in (self._unix, self._tcp, self._wake):
            waiting.register(source, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll()}
            if self._wake in ready:
                return
            for server in (self._unix, self._tcp):
                if server.fileno() not in ready:
                    continue
                sock, _ = server.accept()
                threading.Thread(target=self._shake, args=(sock,), daemon=True).start()  # one may fall silent half way

    def _shake(self, sock: socket.socket) -> None:
        try:
            channel = _answer(sock, self._token, self._deadline_s)
        except (OSError, EOFError, DeviceLost, ValueError, RuntimeError):
            sock.close()  # a stranger, or a peer that went away
        else:
            self._accept(channel)

    def close(self) -> None:
        """Stop accepting and free the addresses. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.write(self._woken, b"x")
        self._thread.join()
        for sock in (self._unix, self._tcp):
            sock.close()
        os.close(self._wake)
        os.close(self._woken)


def dial(
    endpoint: Endpoint, *, me: str, peer: str, token: bytes, deadline_s: float, within_s: float = _HANDSHAKE_S
) -> Channel:
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
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout=within_s)
        except OSError as error:
            raise DeviceLost(f"cannot reach {peer} at {endpoint.host}:{endpoint.port}: {error}") from error
        sock.settimeout(None)
    try:
        receive_timeout(sock, within_s)
        _challenge(sock, token, first=False)
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        sock.close()
        raise DeviceLost(f"{peer} refused the connection (another cluster's token?): {error!r}") from error
    channel = Channel(sock, peer, deadline_s)
    channel.send(header(Kind.HELLO), me.encode())
    if channel.read() is None:
        raise DeviceLost(f"{peer} did not answer")
    return channel


def _answer(sock: socket.socket, token: bytes, deadline_s: float) -> Channel:
    receive_timeout(sock, _HANDSHAKE_S)
    _challenge(sock, token, first=True)
    channel = Channel(sock, "", deadline_s)
    hello = channel.read()
    if hello is None or hello.kind != Kind.HELLO:
        raise ValueError("no hello")
    channel.peer = hello.payload.decode()
    channel.send(header(Kind.HELLO))
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
