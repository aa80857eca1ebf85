"""The laboratory itself: what its links do to plain sockets, and that it leaves nothing behind."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from lab import NetLab, why_no_relay, why_not

from splitray.sim.traces import read_trace

_REASON, _NO_RELAY = why_not(), why_no_relay()
pytestmark = [pytest.mark.alone, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]
relayed = pytest.mark.skipif(_NO_RELAY is not None, reason=str(_NO_RELAY))
TRACE = "# time [s], throughput [Mbit/s]\n0 40\n1.5 0\n2.5 8\n"
STEPS = [((0.5, 1.5), 40), ((1.6, 2.4), 0), ((3.5, 5.0), 8)]  # after a cut TCP takes a while to send again
DELAY_S = 0.02

# On a host: gives datagrams back, and sends without end to whoever connects.
HOST = """
import contextlib, socket, sys, threading
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
echo.bind((sys.argv[1], 700))
source = socket.create_server((sys.argv[1], 700))
def flood():
    peer, _ = source.accept()
    with contextlib.suppress(ConnectionError):
        while True:
            peer.sendall(bytes(65536))
threading.Thread(target=flood, daemon=True).start()
print("ready", flush=True)
while True:
    echo.sendto(*echo.recvfrom(2000))
"""


@pytest.fixture
def lab() -> Iterator[NetLab]:
    with NetLab(["edge0"]) as made:
        command = [*made.prefix("edge0"), sys.executable, "-c", HOST, made.hosts["edge0"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as host:
            assert host.stdout is not None and host.stdout.readline(), "the host listens"
            yield made
            made.kill("edge0")


def round_trips_s(lab: NetLab, count: int) -> list[float]:
    """Of datagrams; a lost one has none."""
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(10 * DELAY_S)
        for number in range(count):
            began = time.perf_counter()
            asker.sendto(b"%d" % number, (lab.hosts["edge0"], 700))
            try:
                while asker.recv(20) != b"%d" % number:
                    pass
            except TimeoutError:
                continue
            times.append(time.perf_counter() - began)
    return times


@relayed
def test_a_far_host_answers_after_twice_the_delay_and_as_before_when_it_is_near_again(lab: NetLab) -> None:
    before = statistics.median(round_trips_s(lab, 20))
    with lab.far("edge0", delay_s=DELAY_S):
        far = statistics.median(round_trips_s(lab, 20))
    after = statistics.median(round_trips_s(lab, 20))
    print(f"round trip {1e3 * before:.2f} ms, {1e3 * far:.1f} ms with {1e3 * DELAY_S:g} ms each way, {1e3 * after:.2f}")
    assert max(before, after) < 2 * DELAY_S <= far


@relayed
def test_a_share_of_what_goes_to_a_host_and_comes_from_it_is_lost(lab: NetLab) -> None:
    with lab.far("edge0", delay_s=0.0, loss=0.1):
        lost = 1 - len(round_trips_s(lab, 100)) / 100
    print(f"lost {lost:.0%} of round trips, 19 % is expected")
    assert 0.05 < lost < 0.4


def test_a_link_follows_a_trace(lab: NetLab, tmp_path) -> None:
    (tmp_path / "trace").write_text(TRACE)
    received: list[tuple[float, int]] = []
    with socket.create_connection((lab.hosts["edge0"], 700)) as sink:
        sink.settimeout(0.1)
        with lab.following("edge0", read_trace(str(tmp_path / "trace"))):
            began = time.monotonic()
            while (now := time.monotonic() - began) < STEPS[-1][0][1]:
                try:
                    received.append((now, len(sink.recv(1 << 16))))
                except TimeoutError:
                    continue
    for (start, stop), mbit in STEPS:
        seen = sum(size for at, size in received if start <= at < stop) * 8e-6 / (stop - start)
        print(f"{start:g} to {stop:g} s: {seen:.1f} of {mbit} Mbit/s")
        assert 0.4 * mbit <= seen <= 1.5 * mbit + 2  # a busy machine reads later what came before


@relayed
def test_a_lab_that_breaks_leaves_nothing() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), NetLab(["a"]) as made, made.far("a", delay_s=0.0):
        sleeper = subprocess.Popen([*made.prefix("a"), "sleep", "99"])
        assert made.left()
        raise RuntimeError("on purpose")
    assert sleeper.wait(1) and not made.left()
