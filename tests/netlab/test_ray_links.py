"""The engine over Ray nodes with networks of their own: links and machines fail, and no token changes."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from lab import NetLab, why_no_relay, why_not
from ray_hosts import Driver, RayHosts

from splitray.sim.traces import read_trace

_REASON, _NO_RELAY = why_not(), why_no_relay()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]
SAMPLING = {"max_new_tokens": 300, "temperature": 0.9, "seed": 3}
STRUCK = 50  # tokens before a fault
CUT_S = 2.0
SOON_S = 3.0  # after the link is back; half a second on a quiet machine, which is printed
LOST_S = 10.0
WHOLE_S = 60.0
DELAY_S, LOSS, FEW = 0.01, 0.002, 40
TRACE = "# time [s], throughput [Mbit/s]\n" + "".join(f"{i} {(20, 1.5)[i % 2]}\n" for i in range(60))


@dataclass(frozen=True)
class Cluster:
    """What a test has."""

    lab: NetLab
    nodes: RayHosts
    driver: Driver
    wanted: list[int]

    def whole(self) -> bool:
        """Wait until both devices work."""
        give_up = time.monotonic() + WHOLE_S
        while len(self.driver.pids()) < 2:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.2)
        return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with NetLab(["cloud0", "edge0"]) as lab, Driver(lab, "cloud0") as driver, RayHosts(lab) as nodes:
        began = time.monotonic()
        driver.start(nodes.address)
        print(f"the engine started in {time.monotonic() - began:.1f} s")
        yield Cluster(lab, nodes, driver, [token for token, _ in driver.run(**SAMPLING)])
        driver.close()
    assert not lab.left(), "the laboratory takes itself down"


def struck(cluster: Cluster, strike: Callable[[], object]) -> list[float]:
    """When each token of a run came in which something is done to the cluster; the tokens are those of a quiet run."""
    got, times = [], []
    for token, at_s in cluster.driver.run(**SAMPLING):
        got.append(token)
        times.append(at_s)
        if len(got) == STRUCK:
            strike()
    assert got == cluster.wanted
    return times


def longest_wait_s(times: list[float]) -> float:
    return max(b - a for a, b in pairwise(times))


def test_a_link_cut_for_two_seconds_costs_little_more_than_that(cluster: Cluster) -> None:
    back: list[float] = []

    def cut() -> None:
        cluster.lab.cut("edge0")
        time.sleep(CUT_S)
        cluster.lab.restore("edge0")
        back.append(time.monotonic())

    cutter = threading.Thread(target=cut)
    times = struck(cluster, cutter.start)
    cutter.join()
    faults = cluster.driver.faults()
    assert faults and not any(f["restarted"] or f["left_out"] for f in faults), "nobody died"
    later_s = min(t for t in times if t > back[0]) - back[0]
    print(f"cut for {CUT_S:g} s: the next token {later_s:.2f} s after the link was back")
    assert later_s < SOON_S


def test_a_killed_actor_is_left_out_and_gets_back_what_it_held(cluster: Cluster) -> None:
    pid = cluster.driver.pids()["cloud0"]
    times = struck(cluster, lambda: os.kill(pid, signal.SIGKILL))
    print(f"cloud0's actor killed: the longest wait for a token {longest_wait_s(times):.2f} s")
    assert cluster.driver.faults()[0]["left_out"] == ["cloud0"]
    assert cluster.whole() and cluster.driver.pids()["cloud0"] != pid


@pytest.mark.skipif(_NO_RELAY is not None, reason=str(_NO_RELAY))
def test_a_late_and_lossy_link_that_follows_a_trace_changes_no_token(cluster: Cluster, tmp_path) -> None:
    (tmp_path / "trace").write_text(TRACE)
    few = SAMPLING | {"max_new_tokens": FEW}
    near = list(cluster.driver.run(**few))  # before the echo too: devices count attempts alike only behind a run
    near_s = statistics.median(cluster.driver.round_trips_s(size=64, rounds=20))
    with cluster.lab.far("edge0", delay_s=DELAY_S, loss=LOSS):
        far_s = statistics.median(cluster.driver.round_trips_s(size=64, rounds=20))
        with cluster.lab.following("edge0", read_trace(str(tmp_path / "trace"))):
            far = list(cluster.driver.run(**few))
    print(f"round trip {1e3 * near_s:.1f} ms, {1e3 * far_s:.1f} ms with {1e3 * DELAY_S:g} ms each way")
    each_ms = [1e3 * (run[-1][1] - run[0][1]) / (FEW - 1) for run in (near, far)]
    print(
        f"a token {each_ms[0]:.0f} ms, {each_ms[1]:.0f} ms with {LOSS:.1%} of frames lost and 1.5 to 20 Mbit/s as well"
    )
    assert [token for token, _ in far] == cluster.wanted[:FEW]
    assert near_s < 2 * DELAY_S <= far_s < 20 * DELAY_S


def test_a_machine_that_dies_is_left_out_within_ten_seconds_and_gets_back_what_it_held(cluster: Cluster) -> None:
    times = struck(cluster, lambda: cluster.nodes.kill("edge0"))
    print(f"edge0's machine killed: the longest wait for a token {longest_wait_s(times):.2f} s")
    assert longest_wait_s(times) < LOST_S
    assert cluster.driver.faults()[0]["left_out"] == ["edge0"]
    cluster.nodes.start("edge0")
    assert cluster.whole()
    assert struck(cluster, lambda: None)
