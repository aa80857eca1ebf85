"""Devices come back: each by itself, whatever kept it away, and no run waits for one that it does not need."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from splitray.errors import DeviceLost, InputError
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.device.epochs import Epochs
from splitray.runtime.engine import asking
from splitray.runtime.engine.backoff import Backoff
from splitray.runtime.engine.policy import Recovery, without
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire import listener
from splitray.runtime.wire.messages import PingOrder

PROMPT = list(range(3, 20))
FEW = Sampling(max_new_tokens=6)
MORE = Sampling(max_new_tokens=40)
SOON_S = 20.0  # on a busy machine; the waits below end as soon as what they wait for is there


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def wanted():
    with launch_engine(model="tiny", devices=1, runtime="local") as engine:
        return list(engine.stream(PROMPT, MORE))


class Hosts(ThreadFleet):
    """Threads whose hosts can be off, slow to start, or out of something."""

    def __init__(self) -> None:
        super().__init__()
        self.off: set[str] = set()
        self.start_s: dict[str, float] = {}
        self.errors: list[Exception] = []
        self.started: list[str] = []
        self.begun: list[str] = []

    def restart(self, device):
        self.begun.append(device.id)
        time.sleep(self.start_s.get(device.id, 0.0))
        if device.id in self.off:
            raise DeviceLost(f"{device.id}: its host is off")
        if self.errors:
            raise self.errors.pop()
        self.started.append(device.id)
        return super().restart(device)


@contextmanager
def running(devices=3, **recovery):
    fleet = Hosts()
    with launch_engine(
        model="tiny", devices=devices, planner="even", fleet=fleet, recovery=Recovery(**{"replan": "even"} | recovery)
    ) as engine:
        yield engine, fleet
        fleet.off, fleet.start_s = set(), {}


def comes(condition, within_s=SOON_S) -> bool:
    give_up = time.monotonic() + within_s
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.02)
    return bool(condition())


def placed(engine, *out):
    left = without(engine.topology, out)
    return make_planner("even").propose(ClusterState(arch=engine.arch, topology=left))


def moved(engine, placement, **where) -> Exception | None:
    coming = engine.migrate(placement, **where)
    assert coming.done.wait(30)
    return coming.error


def test_who_dies_off_the_route_is_brought_back_and_no_run_notices(wanted):
    with running() as (engine, fleet):
        assert moved(engine, placed(engine, "cloud1")) is None
        fleet.started.clear()
        fleet.kill("cloud1")
        assert list(engine.stream(PROMPT, MORE)) == wanted and engine.faults == []
        assert comes(lambda: fleet.started == ["cloud1"] and "cloud1" in engine.members.connected)
        assert engine.faults == []


def test_a_living_device_off_the_route_stays_within_reach_after_a_recovery(wanted):
    with running(replan=None) as (engine, fleet):
        whole = engine.placement
        assert moved(engine, placed(engine, "cloud1")) is None
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, MORE)):
            tokens.append(token)
            if n == 4:
                fleet.kill("cloud0")
        assert tokens == wanted
        assert sorted(engine.stats()) == ["cloud0", "cloud1", "edge0"]
        assert moved(engine, whole) is None and len(engine.faults) == 1


def test_a_session_that_ends_while_a_device_is_cut_off_is_freed_there_too():
    with running(replan=None) as (engine, fleet):
        assert moved(engine, placed(engine, "cloud1")) is None
        held = fleet.hosts["cloud1"].epochs
        engine.members.cut_off(["cloud1"])
        list(engine.stream(PROMPT, FEW))
        assert comes(lambda: not held.current.caches)


def test_starts_run_side_by_side_and_the_run_goes_on_with_the_first(wanted):
    with running() as (engine, fleet):
        fleet.begun.clear()
        fleet.start_s = {"edge0": 6.0, "cloud0": 0.5, "cloud1": 6.0}
        tokens, began, gap_s = [], 0.0, 0.0
        for n, token in enumerate(engine.stream(PROMPT, MORE)):
            if began and not gap_s:
                gap_s = time.monotonic() - began
            tokens.append(token)
            if n == 9:
                began = time.monotonic()
                for device in ("edge0", "cloud0", "cloud1"):
                    fleet.kill(device)
        assert tokens == wanted and sorted(fleet.begun) == ["cloud0", "cloud1", "edge0"]
        assert gap_s < 5.0, "one start sufficed"
        assert engine.faults[0].recovery_s < gap_s + 0.5
        fleet.start_s = {}


def test_another_fault_does_not_wait_for_a_start_that_is_under_way(wanted):
    with running() as (engine, fleet):
        fleet.start_s = {"cloud1": 6.0}
        fleet.kill("cloud1")
        list(engine.stream(PROMPT, FEW))
        assert comes(lambda: "cloud1" in fleet.begun[3:])
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, MORE)):
            tokens.append(token)
            if n == 5:
                fleet.kill("cloud0")
        assert tokens == wanted and fleet.started.count("cloud1") == 1, "it went on before that start ended"


@pytest.mark.parametrize("off_s", [0.0, 1.0])
def test_the_last_one_dies_and_those_that_live_or_can_be_started_take_over(off_s, wanted):
    with running(backoff=Backoff(budget_s=SOON_S)) as (engine, fleet):
        fleet.off = {"edge0", "cloud0", "cloud1"}
        fleet.kill("cloud0")
        fleet.kill("cloud1")
        list(engine.stream(PROMPT, FEW))
        assert [*engine.route.devices] == ["edge0"]
        if off_s:
            threading.Timer(off_s, lambda: setattr(fleet, "off", {"edge0"})).start()
        else:
            fleet.off = {"edge0"}
            assert comes(lambda: len(engine.members.endpoints) == 3)
        fleet.kill("edge0")
        assert list(engine.stream(PROMPT, MORE)) == wanted
        assert "edge0" not in engine.route.devices and engine.lost is None


def test_tries_while_a_host_is_away_do_not_use_up_the_budget():
    with running(devices=2, restarts=3) as (engine, fleet):
        fleet.off = {"cloud0"}
        fleet.kill("cloud0")
        list(engine.stream(PROMPT, FEW))
        assert comes(lambda: len(fleet.begun) > 8)
        fleet.off = set()
        assert comes(lambda: "cloud0" in engine.route.devices)
        assert len(engine.members.restarted["cloud0"]) == 1


def test_a_device_that_dies_again_and_again_is_left_alone_for_a_while(wanted):
    with running(devices=2, restarts=2, restarts_within_s=3600.0) as (engine, fleet):
        for _ in range(2):
            fleet.kill("cloud0")
            assert comes(lambda: fleet.dead() == {} and "cloud0" in engine.route.devices and engine.members.connected)
        fleet.kill("cloud0")
        assert list(engine.stream(PROMPT, MORE)) == wanted
        assert comes(lambda: "started anew 2 times" in engine.members.starts.failures.get("cloud0", ""))
        assert fleet.started.count("cloud0") == 3, "the first start and two more"


@pytest.mark.parametrize("off", ["cloud0", "cloud1"])
def test_each_returns_by_itself(off, wanted):
    well = {"cloud0": "cloud1", "cloud1": "cloud0"}[off]
    with running() as (engine, fleet):
        fleet.off = {off}
        fleet.kill("cloud0")
        fleet.kill("cloud1")
        list(engine.stream(PROMPT, FEW))
        assert comes(lambda: {*engine.route.devices} == {"edge0", well})
        assert list(engine.stream(PROMPT, MORE)) == wanted
        fleet.off = set()
        assert comes(lambda: len(engine.route.devices) == 3)
        assert list(engine.stream(PROMPT, MORE)) == wanted


def test_one_that_dies_before_it_has_its_pieces_is_brought_back_again(monkeypatch):
    with running() as (engine, fleet):
        stage, struck = engine.succession.stage, list[int]()

        def strikes(epoch, sessions, **how):
            answers = stage(epoch, sessions, **how)
            if "cloud1" in epoch.route.devices and not struck:
                struck.append(1)
                fleet.kill("cloud1")
            return answers

        engine.succession.stage = strikes
        fleet.kill("cloud1")
        assert comes(lambda: struck and "cloud1" in engine.route.devices and not fleet.dead())
        assert fleet.started.count("cloud1") == 3


@pytest.mark.thin(5)
@pytest.mark.parametrize("replan", ["even", None])
@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        MemoryError("no memory"),
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("can't start new thread"),
        DeviceLost("no room yet"),
    ],
    ids=["eagain", "enomem", "emfile", "thread", "room"],
)
def test_whatever_a_start_meets_is_tried_again(error, replan, wanted):
    with running(devices=2, replan=replan) as (engine, fleet):
        fleet.errors = [error]
        fleet.kill("cloud0")
        assert list(engine.stream(PROMPT, MORE)) == wanted
        assert comes(lambda: "cloud0" in engine.route.devices and fleet.errors == [] and not fleet.dead())


def test_an_engine_without_a_way_to_go_on_is_there_again_when_its_devices_are(wanted):
    with running(devices=2, replan=None, backoff=Backoff(budget_s=0.5)) as (engine, fleet):
        fleet.off = {"cloud0"}
        fleet.kill("cloud0")
        with pytest.raises(DeviceLost, match="cloud0: its host is off"):
            list(engine.stream(PROMPT, FEW))
        assert engine.lost is None
        fleet.off = set()
        assert comes(lambda: not fleet.dead())
        assert list(engine.stream(PROMPT, MORE)) == wanted


@pytest.mark.parametrize("replan", ["even", None])
def test_a_fault_while_nothing_runs_is_mended_before_the_next_request(replan, wanted):
    with running(replan=replan) as (engine, fleet):
        fleet.off = {"cloud0"}
        for device in ("edge0", "cloud0", "cloud1"):
            fleet.kill(device)
        time.sleep(0.5)
        fleet.off = set()
        assert comes(lambda: engine.faults and not fleet.dead() and len(engine.route.devices) == 3)
        faults = len(engine.faults)
        assert list(engine.stream(PROMPT, MORE)) == wanted and len(engine.faults) == faults


def test_others_stand_by_again_when_who_was_lost_is_back():
    with running(devices=2, stand_by=("edge0",)) as (engine, fleet):
        before = engine.stats()["cloud0"]["weight_bytes"]
        fleet.kill("cloud0")
        list(engine.stream(PROMPT, FEW))
        assert comes(lambda: len(engine.route.devices) == 2)
        assert engine.stats()["cloud0"]["weight_bytes"] >= before


def test_a_session_that_ends_while_slices_load_does_not_keep_a_device_out(monkeypatch, wanted):
    """The KV that was to be copied is gone; what was loaded is kept for the next try."""
    copy, began, go_on, donors = Epochs.copy, threading.Event(), threading.Event(), []
    build = Epochs._build

    def noted(epochs, assignment, lenders, ready, old=None):
        if epochs.device == "cloud1":
            donors.append(ready is not None)
        return build(epochs, assignment, lenders, ready, old)

    def slow(epochs, staged, session):
        if epochs.device == "cloud1" and not began.is_set():
            began.set()
            go_on.wait(20)
        return copy(epochs, staged, session)

    monkeypatch.setattr(Epochs, "copy", slow)
    monkeypatch.setattr(Epochs, "_build", noted)
    with running() as (engine, fleet):
        donors.clear()
        run = engine.stream(PROMPT, Sampling(max_new_tokens=450))
        next(run)
        fleet.kill("cloud1")
        give_up = time.monotonic() + SOON_S
        while not began.is_set() and time.monotonic() < give_up:
            next(run)
            time.sleep(0.02)
        assert began.is_set()
        run.close()
        go_on.set()
        assert list(engine.stream(PROMPT, MORE)) == wanted
        assert comes(lambda: "cloud1" in engine.route.devices)
        assert donors == [False, True], "read once"
        assert list(engine.stream(PROMPT, MORE)) == wanted
        assert comes(lambda: all(not h.epochs.current.caches for h in fleet.hosts.values())), "none is left behind"


def test_one_that_falls_silent_while_it_loads_does_not_block_moves(monkeypatch):
    with running(devices=2, replan=None, patience_s=0.5) as (engine, _):
        monkeypatch.setattr(asking, "_PING_EVERY_S", 0.2)
        stage, hang = Epochs.stage, threading.Event()

        def hangs(epochs, order):
            if epochs.device == "cloud0":
                monkeypatch.setattr(asking, "_lives", lambda *_: False)
                hang.wait(20)
            return stage(epochs, order)

        monkeypatch.setattr(Epochs, "stage", hangs)
        began = time.monotonic()
        error = moved(engine, placed(engine))
        assert isinstance(error, DeviceLost) and "no sign of life" in str(error)
        assert time.monotonic() - began < 15.0
        hang.set()


def test_faults_and_decisions_are_not_remembered_for_ever(monkeypatch):
    from splitray.runtime.engine import upkeep

    monkeypatch.setattr(upkeep, "_KEPT", 2)
    with running(devices=2, replan=None, restarts=100) as (engine, fleet):
        for _ in range(4):
            fleet.kill("cloud0")
            list(engine.stream(PROMPT, FEW))
        assert len(engine.faults) == 2


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"restarts": -1}, "restarts"),
        ({"every_tokens": 0}, "every_tokens"),
        ({"patience_s": -1.0}, "patience_s"),
        ({"stall_s": 0.0}, "stall_s"),
        ({"failures_per_s": float("nan")}, "failures_per_s"),
        ({"stand_by": ("edge0",)}, "stand_by"),
        ({"replan": "no_such_planner"}, "planner"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, named):
    with pytest.raises(InputError, match=named):
        Recovery(**values)


def test_a_backoff_that_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="most_s"):
        Backoff(first_s=5.0, most_s=1.0)
    with pytest.raises(InputError, match="budget_s"):
        Backoff(budget_s=-1.0)


def test_what_cannot_be_used_is_said_before_anything_starts(tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("no folder")
    for recovery, named in (
        (Recovery(store=str(blocked / "store")), "checkpoint store"),
        (Recovery(store="nosuch://bucket"), "checkpoint store"),
        (Recovery(replan="even", stand_by=("cloud9",)), "cloud9"),
    ):
        fleet = Hosts()
        with pytest.raises(InputError, match=named):
            launch_engine(model="tiny", devices=2, fleet=fleet, recovery=recovery)
        assert fleet.started == []


def test_who_is_not_there_any_more_is_a_lost_device_and_no_programming_error(monkeypatch, wanted):
    """A device is left beside a recovery that has just decided to use it."""
    with running() as (engine, fleet):
        stage, left = engine.succession.stage, list[str]()

        def leaves(epoch, sessions, **how):
            if not left and "cloud1" in epoch.route.devices and engine.members.disturbed:
                left.append("cloud1")
                fleet.kill("cloud1")
                engine.members.leave("cloud1")
            return stage(epoch, sessions, **how)

        monkeypatch.setattr(engine.succession, "stage", leaves)
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, MORE)):
            tokens.append(token)
            if n == 4:
                fleet.kill("cloud0")
        assert tokens == wanted and left
        assert comes(lambda: len(engine.route.devices) == 3)


def test_stats_after_a_run_count_no_kv_of_it(monkeypatch):
    """They are asked beside the runs, and yet after the order that ends the session."""
    end = Epochs.end

    def slowly(epochs, session) -> None:
        time.sleep(0.3)
        end(epochs, session)

    monkeypatch.setattr(Epochs, "end", slowly)
    with running(devices=2) as (engine, _):
        list(engine.stream(PROMPT, FEW))
        assert {s["kv_bytes"] for s in engine.stats().values()} == {0}


def test_the_time_of_a_recovery_does_not_count_what_was_idle_before(wanted):
    with running(devices=2, replan=None) as (engine, fleet):
        list(engine.stream(PROMPT, FEW))
        engine.members.heard_s -= 1000.0
        run = engine.stream(PROMPT, MORE)
        tokens = [next(run)]
        fleet.kill("cloud0")
        assert tokens + list(run) == wanted
        assert 0 < engine.faults[-1].recovery_s < 100.0


def test_a_device_that_answers_late_is_not_silent_because_others_were_dialled_before_it(monkeypatch):
    with running(devices=3) as (engine, _):
        dial = listener.dial

        def slow(endpoint, **how):
            time.sleep(0.2)
            return dial(endpoint, **how)

        monkeypatch.setattr(asking, "dial", slow)
        orders = dict.fromkeys(engine.members.endpoints, PingOrder())
        assert len(engine.members.ask(orders, within_s=0.25)) == 3
