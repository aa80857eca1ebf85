"""The data plane: frames arrive whole and once, deadlines hold, strangers are refused, two floods do not lock."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from splitray.errors import DeviceLost
from splitray.runtime.wire import Channel, Endpoint, Key, Kind, StopRun, Wire, header, new_token
from splitray.runtime.wire.listener import Listener, dial


def _pair(deadline_s: float = 5.0) -> tuple[Wire, Wire]:
    a, b = socket.socketpair()
    left, right = Wire(), Wire()
    left.channels["right"] = Channel(a, "right", deadline_s)
    right.channels["left"] = Channel(b, "left", deadline_s)
    return left, right


def _header(attempt=1, position=0, boundary=0, kind=Kind.TENSOR, epoch=0, shape=(3,)):
    return header(kind, 7, epoch, boundary, position, attempt, "uint8", shape)


def test_a_frame_arrives_with_its_header_and_bytes():
    left, right = _pair()
    right.begin(1)
    left.send("right", _header(position=4, boundary=9), b"abc")
    frame = right.receive("left", Key(1, 4, 9))
    assert (frame.session, frame.key, bytes(frame.payload)) == (7, Key(1, 4, 9), b"abc")


def test_headers_cost_less_than_five_percent_of_a_small_boundary():
    left, _ = _pair()
    left.send("right", _header(position=1023, boundary=49, attempt=1000, shape=(1, 1, 768)), bytes(3072))
    assert left.traffic.payload_bytes == 3072
    assert left.traffic.wire_bytes <= 1.05 * 3072


def test_stale_and_repeated_frames_are_dropped_and_early_ones_kept():
    left, right = _pair()
    right.begin(2)
    for fields, payload in [
        (_header(attempt=1, position=9), b"old"),
        (_header(attempt=2, position=1), b"one"),
        (_header(attempt=2, position=1), b"one"),
        (_header(attempt=2, position=3), b"tri"),
        (_header(attempt=2, position=2, epoch=5), b"bad"),
        (_header(attempt=2, position=2), b"two"),
    ]:
        left.send("right", fields, payload)
    got = [bytes(right.receive("left", Key(2, p, 0)).payload) for p in (1, 2, 3)]
    assert got == [b"one", b"two", b"tri"]
    assert right.dropped == 3


def test_the_end_of_a_run_interrupts_a_receive_and_the_end_of_an_earlier_run_does_not():
    left, right = _pair()
    right.begin(2)
    left.tell("right", _header(attempt=1, kind=Kind.STOP))
    left.tell("right", _header(attempt=2, kind=Kind.STOP))
    with pytest.raises(StopRun):
        right.receive("left", Key(2, 0, 0))
    assert right.dropped == 1


def test_a_silent_peer_is_lost_at_the_deadline():
    _, right = _pair(deadline_s=0.3)
    start = time.monotonic()
    with pytest.raises(DeviceLost, match="nothing for 0.3 s"):
        right.receive("left", Key(0, 0, 0))
    assert 0.2 < time.monotonic() - start < 3


def test_a_closed_peer_is_lost_at_once():
    left, right = _pair()
    left.close()
    with pytest.raises(DeviceLost, match="closed the connection"):
        right.receive("left", Key(0, 0, 0))


def test_two_devices_that_send_each_other_more_than_the_sockets_hold_do_not_lock():
    left, right = _pair()
    big = bytes(20_000_000)

    def exchange(wire: Wire, peer: str, got: list[int]) -> None:
        wire.begin(1)
        for i in range(3):
            wire.send(peer, _header(boundary=i), big)
        for i in range(3):
            got.append(len(wire.receive(peer, Key(1, 0, i)).payload))
        wire.flush()

    results: tuple[list[int], list[int]] = ([], [])
    threads = [
        threading.Thread(target=exchange, args=(left, "right", results[0])),
        threading.Thread(target=exchange, args=(right, "left", results[1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == ([len(big)] * 3, [len(big)] * 3)


@pytest.fixture
def listener():
    token = new_token()
    accepted: list[Channel] = []
    listener = Listener(token=token, host="127.0.0.1", deadline_s=5, accept=accepted.append)
    yield listener, token, accepted
    listener.close()


@pytest.mark.parametrize("by_tcp", [False, True])
def test_peers_with_the_clusters_token_connect_by_unix_socket_or_tcp(listener, by_tcp):
    server, token, accepted = listener
    endpoint = Endpoint("nobody-here", server.endpoint.host, server.endpoint.port) if by_tcp else server.endpoint
    channel = dial(endpoint, me="edge0", peer="cloud0", token=token, deadline_s=5)
    family = socket.AF_INET if by_tcp else socket.AF_UNIX
    assert channel.sock.family == family
    give_up = time.monotonic() + 5
    while not accepted and time.monotonic() < give_up:  # the listener's thread is a little later than the handshake
        time.sleep(0.001)
    assert [c.peer for c in accepted] == ["edge0"]
    channel.close()


def test_a_peer_with_another_token_is_refused_and_the_next_one_served(listener):
    server, token, accepted = listener
    with pytest.raises(DeviceLost, match="token"):
        dial(server.endpoint, me="stranger", peer="cloud0", token=b"x" * 32, deadline_s=5)
    dial(server.endpoint, me="edge0", peer="cloud0", token=token, deadline_s=5).close()
    give_up = time.monotonic() + 5
    while not accepted and time.monotonic() < give_up:  # the listener's thread is a little later than the handshake
        time.sleep(0.001)
    assert [c.peer for c in accepted] == ["edge0"]


def test_nobody_listening_is_a_clear_error():
    with pytest.raises(DeviceLost, match="cannot reach cloud0"):
        dial(Endpoint("nobody", "127.0.0.1", 1), me="edge0", peer="cloud0", token=b"x", deadline_s=1)


MANY_DESCRIPTORS = 1100  # select.select ends at 1024
UNDER_MANY_DESCRIPTORS = f"""
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, ({MANY_DESCRIPTORS} + 900, hard))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range({MANY_DESCRIPTORS})]
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire.calls import call
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import BounceOrder
with launch_engine(model="tiny", devices=2, planner="even", runtime="local") as engine:
    print(len(list(engine.stream([5, 6, 7], Sampling(max_new_tokens=5)))))
    device, endpoint = next(iter(engine.members.endpoints.items()))
    channel = dial(endpoint, me="side/engine", peer=device, token=engine.fleet.token, deadline_s=20)
    call(channel, BounceOrder(num_bytes=1, filling=bytes(3_000_000)))
    print(channel.sock.fileno() > 1024, len(channel.read().payload))
    channel.close()
"""


@pytest.mark.skipif(
    0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < MANY_DESCRIPTORS + 900, reason="too few descriptors allowed"
)
def test_devices_start_and_take_large_orders_where_more_than_1024_descriptors_are_open():
    script = [sys.executable, "-c", UNDER_MANY_DESCRIPTORS]
    done = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("5\nTrue 1\n", 0), done.stderr
