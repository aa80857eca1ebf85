"""Addresses of Ray clusters: what cannot be one, and who answers there if not Ray; told soon, with what to do."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated.gcs_service_pb2 import CheckAliveReply

from splitray import ray_address
from splitray.errors import InputError, StartFailed
from splitray.ray_address import running_cluster

SOON_S = 30.0  # for tests of no speed


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Ray of this machine counts, and nobody waits for six seconds."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_address, "_LAST_STARTED", tmp_path / "ray_current_cluster")
    monkeypatch.setattr(ray_address, "_raylets", lambda: [])
    monkeypatch.setattr(ray_address, "_ANSWER_S", 0.5)
    monkeypatch.setattr(ray_address, "_CONNECT_S", 0.3)


@pytest.mark.parametrize(
    "named",
    ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", ":6379",
     "::1:6379",
     "[::1]", "[not-v6]:6379", "a b:6379", "127.0.0.1:six", "127.0.0.1:6379/x", "127.0.0.1:6379,127.0.0.1:6380", " ",
     "AUTO", "a\x00b:1", "-1", f"{'a' * 300}:6379"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_who_named_it(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--address: expected HOST:PORT .*ray start"):
        running_cluster(named)
    if "\x00" not in named:
        monkeypatch.setenv("RAY_ADDRESS", named)
        with pytest.raises(InputError, match="RAY_ADDRESS: expected HOST:PORT"):
            running_cluster()


def test_without_an_address_or_with_local_a_command_has_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert running_cluster() is None and running_cluster("local") is None
    for named in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", named)
        assert running_cluster() is None


@contextmanager
def listener(says: bytes | None, *, closes: bool) -> Iterator[str]:
    """Somebody who takes connections and is not Ray."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                    held.append(peer)
                    if says is not None:
                        peer.sendall(says)
                    if closes:
                        peer.close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for peer in held:
                peer.close()


@contextmanager
def web_server() -> Iterator[str]:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def nobody() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    yield f"127.0.0.1:{port}"


@contextmanager
def black_hole() -> Iterator[str]:
    """Packets get lost: the queue of those who want to connect is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Head(grpc.GenericRpcHandler):
    """A head of a cluster, as far as it is asked."""

    def __init__(self, reply: CheckAliveReply | None, code: grpc.StatusCode | None = None) -> None:
        self.reply, self.code, self.heard = reply, code, []  # type: ignore[var-annotated]

    def service(self, call: Any) -> Any:
        if self.reply is None and self.code is None:
            return None

        def answer(_: bytes, context: Any) -> bytes:
            self.heard.append(dict(context.invocation_metadata()))
            if self.code is not None:
                context.abort(self.code, "no")
            assert self.reply is not None
            return self.reply.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def head(handler: Head) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(SOON_S)


LISTENS = "something listens there"
OTHERS = {
    "nobody": (nobody, "nobody answers there .Connection refused"),
    "a black hole": (black_hole, "nobody answers there .timed out"),
    "one who says nothing": (lambda: listener(None, closes=False), LISTENS),
    "one who talks garbage": (lambda: listener(b"\0\xff garbage\r\n" * 50, closes=True), LISTENS),
    "one who hangs up": (lambda: listener(None, closes=True), LISTENS),
    "a web server": (web_server, LISTENS),
    "a server of gRPC that is no Ray": (lambda: head(Head(None)), LISTENS),
    "an old Ray": (
        lambda: head(Head(CheckAliveReply(ray_version="2.9.0"))),
        f"version mismatch: it runs Ray 2.9.0, this is {ray.__version__}",
    ),
    "a cluster without a node here": (
        lambda: head(Head(CheckAliveReply(ray_version=ray.__version__))),
        "none of its nodes runs on this machine; join it with `ray start --address=",
    ),
}


@pytest.mark.parametrize(("who", "says"), OTHERS.values(), ids=OTHERS)
def test_who_answers_is_told_with_what_to_do(who: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with who() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(StartFailed, match=says) as told:
            running_cluster()
    assert f"the Ray cluster at {address} (of RAY_ADDRESS)" in str(told.value)


def test_a_host_that_nobody_knows_is_told() -> None:
    with pytest.raises(StartFailed, match="name of its host is not known|Name or service not known"):
        running_cluster("no-such-host.invalid:6379")


def test_a_cluster_with_a_node_here_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Head(CheckAliveReply(ray_version=ray.__version__, raylet_alive=[False, True]))
    with head(alive) as address:
        found = running_cluster(address)
        assert found is not None and found.text == address
        Path(ray_address._LAST_STARTED).write_text(address)
        last = running_cluster()
        assert last is not None and last.text == address


TOKEN = "a" * 64


@pytest.mark.parametrize(
    ("environment", "file", "says", "sent"),
    [
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}, "", "it wants a token, and there is none here", None),
        ({}, "", "it wants a token, and there is none here", None),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "old", "not the one of RAY_AUTH_TOKEN", TOKEN),
        ({}, "old", "not the one of ~/.ray/auth_token", "old"),
        ({"RAY_AUTH_TOKEN_PATH": "mine"}, "old", "not the one of RAY_AUTH_TOKEN_PATH mine", "own"),
    ],
)
def test_another_token_is_told_from_none_and_where_it_came_from(
    environment: dict[str, str], file: str, says: str, sent: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("own\n")
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(file)
    asked = Head(None, grpc.StatusCode.UNAUTHENTICATED)
    with head(asked) as address, pytest.raises(StartFailed, match=says):
        running_cluster(address)
    assert asked.heard[0].get("authorization") == (None if sent is None else f"Bearer {sent}")


@pytest.mark.parametrize("left", [b"", b"127.0.0.1:1", b"\xff\xfe", b"nonsense", None])
def test_what_an_ended_ray_left_behind_is_passed_over(left: bytes | None) -> None:
    if left is None:
        ray_address._LAST_STARTED.mkdir()
    else:
        ray_address._LAST_STARTED.write_bytes(left)
    assert running_cluster() is None


def test_auto_is_the_one_that_runs_here_and_refuses_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_address._LAST_STARTED.write_text("127.0.0.1:2")
    with pytest.raises(StartFailed, match="no Ray cluster runs on this machine; 127.0.0.1:2 in .* has ended"):
        running_cluster("auto")
    monkeypatch.setattr(ray_address, "_raylets", lambda: [("127.0.0.1:1", b""), ("127.0.0.1:2", b"")])
    with pytest.raises(InputError, match="2: 127.0.0.1:1, 127.0.0.1:2 .started last.; name one of them"):
        running_cluster("auto")
    alive = Head(CheckAliveReply(ray_version=ray.__version__, raylet_alive=[True]))
    with head(alive) as address:
        monkeypatch.setattr(ray_address, "_raylets", lambda: [(address, b"a"), (address, b"b")])
        found = running_cluster("auto")
        assert found is not None and (found.text, found.named_by) == (address, "--address=auto")
