"""How devices wait in a run, with a clock of the test's own: asleep until shortly before a frame is due, then awake."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field

import pytest

from splitray.errors import DeviceLost
from splitray.runtime.wire import Channel, FreeCores, Key, Kind, Waits, Wire, header

LOOK_S, LATENESS_S = 1e-6, 70e-6  # what a look at the socket takes, and by how much a timer of Linux is late


@dataclass
class Peer:
    """A peer whose frames come when the test says; it is also the clock, the timer and the cores."""

    peer: str = "cloud0"
    now_s: float = 100.0
    comes_s: float = 0.0
    any: bool = True
    looks: int = 0
    sleeps: list[float] = field(default_factory=list)

    def has_come(self) -> bool:
        self.looks += 1
        self.now_s += LOOK_S
        return self.now_s >= self.comes_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds + LATENESS_S


@dataclass
class Step:
    late_s: float
    awake: bool
    looks: int
    sleeps: list[float]


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def waits(peer: Peer) -> Waits:
    waits = Waits(peer, clock=lambda: peer.now_s, sleep=peer.sleep)  # type: ignore[arg-type]
    waits.alike = True
    return waits


def step(waits: Waits, peer: Peer, wait_s: float, boundary: int = 5) -> Step:
    """One step in which the frame of a boundary comes `wait_s` after the device has begun to wait for it."""
    peer.looks, peer.sleeps, peer.comes_s = 0, [], peer.now_s + wait_s
    waits.begin(peer, boundary)
    late_s = peer.now_s - peer.comes_s
    peer.now_s = max(peer.now_s, peer.comes_s)  # what is not there yet is received asleep
    waits.end()
    return Step(late_s, late_s >= 0, peer.looks, peer.sleeps)


def test_a_frame_that_is_due_soon_finds_the_device_awake(waits, peer):
    steps = [step(waits, peer, 50e-6) for _ in range(20)]
    assert all(s.awake and s.late_s <= 2 * LOOK_S and not s.sleeps for s in steps)


def test_after_eight_steps_a_long_wait_is_slept_and_its_end_awaited_awake(waits, peer):
    steps = [step(waits, peer, 3e-3) for _ in range(12)]
    assert [bool(s.sleeps) for s in steps] == [False] * 8 + [True] * 4
    assert not any(s.awake for s in steps[:8])
    assert all(s.awake and s.late_s <= 2 * LOOK_S for s in steps[8:])


@pytest.mark.parametrize("wait_s", [0.5e-3, 3e-3, 30e-3])
def test_what_a_wait_costs_is_bounded(waits, peer, wait_s):
    steps = [step(waits, peer, wait_s) for _ in range(12)]
    assert max(s.looks for s in steps[:8]) * LOOK_S <= 210e-6
    assert max(s.looks for s in steps[8:]) * LOOK_S <= 100e-6


def test_a_frame_that_is_later_than_ever_is_received_asleep(waits, peer):
    for _ in range(8):
        step(waits, peer, 1e-3)
    late = step(waits, peer, 0.4)
    assert not late.awake and late.looks * LOOK_S <= 400e-6
    assert step(waits, peer, 1e-3).awake  # one such wait is no rule


def test_waits_that_become_shorter_are_slept_through_for_a_few_steps_only(waits, peer):
    for _ in range(8):
        step(waits, peer, 5e-3)
    late = [step(waits, peer, 1e-3).late_s for _ in range(40)]
    assert late[0] > 3e-3 and max(late[-8:]) <= 2 * LOOK_S


def test_every_boundary_and_every_peer_has_its_own_wait(waits, peer):
    for _ in range(8):
        step(waits, peer, 3e-3, boundary=1)
    assert not step(waits, peer, 50e-6, boundary=3).sleeps
    other = Peer("edge1", now_s=peer.now_s)
    waits.begin(other, 1)
    assert not other.sleeps


def test_a_wait_too_long_to_gain_by_it_is_slept_as_ever(waits, peer):
    for _ in range(8):
        step(waits, peer, 0.2)
    later = step(waits, peer, 0.2)
    assert later.looks == 1 and not later.sleeps


def test_where_no_core_is_free_nobody_stays_awake(waits, peer):
    peer.any = False
    steps = [step(waits, peer, 1e-3) for _ in range(12)]
    assert all(s.looks == 1 and not s.sleeps for s in steps)


def test_a_prompt_is_awaited_asleep_and_teaches_nothing(waits, peer):
    waits.alike = False
    assert all(step(waits, peer, 20e-3).looks == 0 for _ in range(12))
    waits.alike = True
    assert not step(waits, peer, 50e-6).sleeps


def test_another_run_begins_with_a_prompt_and_knows_nothing(waits, peer):
    for _ in range(8):
        step(waits, peer, 3e-3)
    waits.forget()
    assert not waits.alike
    waits.alike = True
    assert not step(waits, peer, 50e-6).sleeps


def test_who_asks_for_it_stays_awake_for_so_long_whatever_the_step_is(peer):
    peer.any = False
    asked = Waits(peer, spin_s=1e-3, clock=lambda: peer.now_s, sleep=peer.sleep)  # type: ignore[arg-type]
    assert step(asked, peer, 0.9e-3).awake
    assert not step(asked, peer, 1.1e-3).awake


class Looks:
    """A clock and how many threads want a core, by the test's will."""

    def __init__(self, runnable: int) -> None:
        self.runnable, self.now_s = runnable, 0.0

    def cores(self, peers=()) -> FreeCores:
        return FreeCores(peers, clock=lambda: self.now_s, runnable=lambda: self.runnable)

    def any(self, cores: FreeCores) -> list[bool]:
        """Of ten looks, one in 20 ms."""
        found = []
        for _ in range(10):
            self.now_s += 0.02
            found.append(cores.any)
        return found


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("runnable", "any_free"), [(1, True), (2, True), (3, False), (9, False)])
def test_a_core_is_free_while_no_more_threads_want_one_than_there_are(runnable, any_free):
    looks = Looks(runnable)
    assert looks.any(looks.cores()) == [any_free] * 10


@pytest.mark.usefixtures("two_cores")
def test_who_comes_for_a_moment_does_not_take_the_core_and_who_stays_does():
    looks = Looks(2)
    cores = looks.cores()
    assert cores.any
    looks.runnable = 3
    assert looks.any(cores)[0] and not any(looks.any(cores))
    looks.runnable = 1
    assert all(looks.any(cores)[3:])


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("others", "any_free"),
    [((), True), ((1,), True), ((1, 2), False), ((os.getpid(),), False)],
    ids=["alone", "one other", "two others", "a thread of this process"],
)
def test_the_devices_of_a_machine_need_a_core_each_and_a_process_each(others, any_free):
    looks = Looks(1)
    assert looks.any(looks.cores(others)) == [any_free] * 10


def test_a_connection_knows_which_process_of_this_machine_is_at_its_other_end():
    a, b = socket.socketpair()
    with a, b:
        assert Channel(a, "b", 5.0).process == os.getpid()
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as c:
        assert Channel(c, "c", 5.0).process is None


def test_the_threads_of_this_machine_are_counted():
    assert isinstance(FreeCores().any, bool)


def _pair(deadline_s: float) -> tuple[Wire, Wire]:
    a, b = socket.socketpair()
    left, right = Wire(), Wire()
    left.channels["right"], right.channels["left"] = Channel(a, "right", deadline_s), Channel(b, "left", deadline_s)
    for wire in (left, right):
        wire.waits = Waits(FreeCores(runnable=lambda: 0))
        wire.begin(1)
        wire.waits.alike = True
    return left, right


def _header(position: int, kind: Kind = Kind.TENSOR, boundary: int = 1):
    return header(kind, 7, 0, boundary, position, 1, "uint8", (3,))


def test_frames_of_a_wire_whose_waits_are_known_arrive_once_and_in_order():
    left, right = _pair(5.0)
    sent = [bytes([i, 1, 2]) for i in range(30)]

    def send() -> None:
        for i, payload in enumerate(sent):
            left.receive("right", Key(1, i, 0))
            if i % 3 == 0:
                left.send("right", _header(max(0, i - 1)), b"old")
            left.send("right", _header(i), payload)

    thread = threading.Thread(target=send)
    thread.start()
    got = []
    for i in range(len(sent)):
        right.send("left", _header(i, boundary=0), b"you")
        got.append(bytes(right.receive("left", Key(1, i, 1)).payload))
    thread.join(timeout=10)
    assert got == [b"old", *sent[1:]]  # the first is no repeat
    assert right.dropped == 10


def test_a_peer_that_is_silent_or_gone_is_lost_as_ever():
    _, right = _pair(0.3)
    with pytest.raises(DeviceLost, match="nothing for 0.3 s"):
        right.receive("left", Key(1, 0, 1))
    left, right = _pair(5.0)
    left.close()
    with pytest.raises(DeviceLost, match="closed the connection"):
        right.receive("left", Key(1, 0, 1))
