"""Devices that die at any moment: the tokens are those of a run without a fault, nothing hangs or is left open."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import MIXERS, family_model
from splits import greedy, slow_devices, split, threads_of

from splitray.arch import Range
from splitray.errors import DeviceLost, InputError
from splitray.model.kv_cache import KvPiece
from splitray.model.state_dict_source import StateDictSource
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.profiling.faults import MOMENTS, trials
from splitray.runtime.checkpoint import Saved, Store, best_period_tokens
from splitray.runtime.device.shard_host import ShardHost
from splitray.runtime.engine import protection
from splitray.runtime.engine.backoff import Backoff
from splitray.runtime.engine.epoch import kv_sources
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.sampling import Sampling
from splitray.topology import DeviceId, Topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEW_TOKENS = 24
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
DRAWN = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=20, repetition_penalty=1.2, seed=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def replan(model, planner="even"):
    from splitray.model.reading import read_arch

    arch, _ = read_arch(model.config)
    return lambda topology, _: make_planner(planner).propose(ClusterState(arch=arch, topology=topology))


def shard_of(holding):
    assert holding is not None and holding.shard is not None
    return holding.shard


@pytest.mark.thin(8)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kept", [False, True], ids=["no_store", "store"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_five_hundred_faults_change_no_token(family, kept, sampling, tmp_path):
    """63 in each of eight settings: 504. In-process; real processes and actors die in other tests."""
    recovery = Recovery(store=str(tmp_path) if kept else None, every_tokens=4 if kept else None)
    with split(family_model(family), devices=3, seed=1, recovery=recovery) as engine:
        run = trials(engine, threads_of(engine), prompt=PROMPT, sampling=sampling, count=63, seed=4)
        assert len(run.trials) == 63 and run.hangs == 0 and run.leaks == 0
        assert [t for t in run.trials if not t.identical] == []
        assert {t.moment for t in run.struck} == set(MOMENTS), "the faults happen"
        assert len(run.struck) > 40
        restored = [t.replayed for t in run.struck]
        assert max(restored) > 0, "positions are read again"
    assert list(tmp_path.rglob("*.safetensors")) == [], "checkpoints of sessions that are over are deleted"


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", list(MIXERS)[:6])
def test_sixty_faults_over_six_kinds_of_mixers_change_no_token(family, tmp_path):
    """Ten in each; with a store of checkpoints, which keep latents and whole layers too, but for two."""
    kept = family not in ("gpt_oss", "llama4_text")
    recovery = Recovery(store=str(tmp_path) if kept else None, every_tokens=4 if kept else None)
    with split(family_model(family), devices=3, seed=1, recovery=recovery) as engine:
        run = trials(engine, threads_of(engine), prompt=PROMPT, sampling=GREEDY, count=10, seed=4)
        assert len(run.trials) == 10 and run.hangs == 0 and run.leaks == 0
        assert [t for t in run.trials if not t.identical] == []
        assert len(run.struck) >= 5, "the faults happen"


def test_a_checkpoint_spares_reading_positions_again(tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")
    replayed = {}
    for store in (None, str(tmp_path)):
        with split(model, devices=2, planner="even", recovery=Recovery(store=store, every_tokens=4)) as engine:
            tokens = []
            for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
                tokens.append(token)
                if n == 15:
                    threads_of(engine).kill("cloud0")
            assert tokens == greedy(model, PROMPT, NEW_TOKENS)
            replayed[store] = sum(f.replayed for f in engine.faults)
    assert 0 <= replayed[str(tmp_path)] <= 16 < len(PROMPT) + 15 <= replayed[None]


def test_a_device_that_stays_away_is_left_out_and_the_run_goes_on(monkeypatch):
    model = family_model("llama")
    with split(model, devices=3, planner="even", recovery=Recovery(restarts=0, replan=replan(model))) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, DRAWN)):
            tokens.append(token)
            if n == 5:
                threads_of(engine).kill("cloud0")
        assert engine.faults[0].left_out == ("cloud0",) and "cloud0" not in engine.route.devices
        assert list(engine.stream(PROMPT, DRAWN)) == tokens
    with split(model, devices=3, planner="even") as engine:
        assert list(engine.stream(PROMPT, DRAWN)) == tokens


def test_a_device_that_was_left_out_gets_back_what_it_held(monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")
    with split(model, devices=3, planner="even", recovery=Recovery(replan=replan(model))) as engine:
        before, tokens = engine.placement, []
        for n, token in enumerate(engine.stream(PROMPT, Sampling(max_new_tokens=60))):
            tokens.append(token)
            if n == 5:
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, 60)
        assert engine.faults[0].left_out == ("cloud0",) and engine.faults[0].restarted == ()
        assert engine.placement == before and engine.epoch == 2, "left out, and back"


def test_a_device_that_dies_while_others_wait_for_it_in_a_switch_does_not_hold_them_up(monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model, connect, armed = family_model("llama"), ShardHost._connect, list[Callable[[], None]]()

    def dies_first(host, order):
        if armed and host.device == "edge0":
            armed.pop()()
            raise DeviceLost("it is dead")
        connect(host, order)

    with split(model, devices=3, planner="edge_only", recovery=Recovery(replan=replan(model))) as engine:
        tokens, last, gap_s = [], time.monotonic(), 0.0
        monkeypatch.setattr(ShardHost, "_connect", dies_first)
        for n, token in enumerate(engine.stream(PROMPT, Sampling(max_new_tokens=60))):
            gap_s, last = max(gap_s, time.monotonic() - last), time.monotonic()
            tokens.append(token)
            if n == 5:
                armed.append(lambda: threads_of(engine).kill("edge0"))
                engine.migrate(replan(model)(engine.topology, 0))
        assert not armed and tokens == greedy(model, PROMPT, 60)
        assert gap_s < 20.0, "not until the deadline of a connection"


def test_who_stands_by_reads_nothing_when_a_device_is_lost(monkeypatch):
    model = family_model("llama")
    recovery = Recovery(restarts=0, replan=replan(model, "edge_only"), stand_by=("cloud0",))
    with split(model, devices=2, planner="even", recovery=recovery) as engine:
        held = threads_of(engine).hosts["edge0"]
        assert engine.stats()["edge0"]["weight_bytes"] > shard_of(held.epochs.current).weight_bytes, "it counts"
        ready, tokens = shard_of(held.epochs.ready), list[int]()
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 5:
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert shard_of(held.epochs.current) is ready


def test_the_origin_may_be_lost_too():
    model = family_model("llama")
    with split(model, devices=3, planner="even", recovery=Recovery(restarts=0, replan=replan(model))) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 5:
                threads_of(engine).kill("edge0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert engine.topology.origin != "edge0"


def test_replicated_attention_is_a_live_copy_so_that_no_position_is_read_again():
    """More than one: the token that was under way when the device died."""
    model = family_model("llama")
    topology = Topology.uniform(2)
    a, b = topology.ids
    layer = LayerPlacement(Shares.whole(3, a, b), Shares.of({a: [(0, 13)], b: [(13, 40)]}))
    placement = Placement((layer,) * model.config.num_hidden_layers, (a,), Shares.whole(97, a))
    recovery = Recovery(restarts=0, replan=replan(model, "edge_only"))
    with split(model, topology=topology, placement=placement, recovery=recovery) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 8:
                threads_of(engine).kill(b)
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert [f.replayed for f in engine.faults] in ([0], [1])


def test_what_cannot_be_placed_ends_with_what_is_missing():
    model = family_model("llama")
    recovery = Recovery(restarts=0, backoff=Backoff(budget_s=2.0))
    with split(model, devices=2, planner="even", recovery=recovery) as engine:
        with pytest.raises(DeviceLost, match="cloud0") as lost:
            for n, _ in enumerate(engine.stream(PROMPT, GREEDY)):
                if n == 3:
                    threads_of(engine).kill("cloud0")
        assert "no way to go on" in str(lost.value)


def test_a_fault_between_two_runs_is_mended_by_the_next_one():
    model = family_model("llama")
    with split(model, devices=2, planner="even", recovery=Recovery()) as engine:
        list(engine.stream(PROMPT, GREEDY))
        threads_of(engine).kill("cloud0")
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)


def test_two_devices_may_die_at_once():
    model = family_model("llama")
    with split(model, devices=3, planner="even", recovery=Recovery()) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 5:
                threads_of(engine).kill("cloud0")
                threads_of(engine).kill("edge0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("damage", ["truncated", "changed", "deleted"])
def test_a_damaged_checkpoint_is_found_and_what_is_older_is_used(tmp_path, damage, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")
    monkeypatch.setattr(Store, "forget", lambda *_: None)
    with split(model, devices=2, planner="even", recovery=Recovery(store=str(tmp_path), every_tokens=4)) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 15:
                files = sorted(tmp_path.rglob("cloud0-*.safetensors"), key=lambda f: int(f.name.split("-")[1]))
                assert len(files) >= 2
                _damage(files[-1], damage)
                older = int(files[-1].name.split("-")[1])
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        reached = engine.faults[0].replayed
        assert reached >= 15 + len(PROMPT) - older > 0, "from the older one, and not from the damaged one"
        assert reached < 15 + len(PROMPT) + 4, "not from the beginning"
    files, _ = Store(str(next(tmp_path.iterdir()))).manifest()
    for device in ("edge0", "cloud0"):
        held = sorted((f.start, f.stop) for f in files if f"/{device}-" in f.path)
        assert [0, *(stop for _, stop in held)][:-1] == [start for start, _ in held], "without a gap"
        assert held[-1][1] > older, "it is protected again"
    assert all(Store(str(tmp_path)).read(f) for f in files)


def _damage(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(raw[:-5])
    else:
        raw[-3] ^= 1
        file.write_bytes(raw)


def test_a_store_that_is_gone_leaves_the_run_unprotected_and_says_so(tmp_path, caplog, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "_write", full)
    with (
        split(model, devices=2, planner="even", recovery=Recovery(store=str(tmp_path), every_tokens=2)) as engine,
        caplog.at_level(logging.WARNING),
    ):
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 12:
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
    said = [r.message for r in caplog.records if "without a new checkpoint" in r.message]
    assert len(said) == 1 and "No space left" in said[0], "once, and why"


def test_a_store_that_gives_no_answer_holds_up_neither_tokens_nor_the_end_of_a_run(tmp_path, caplog, monkeypatch):
    model, go_on = family_model("llama"), threading.Event()
    monkeypatch.setattr(protection, "_END_S", 0.2)
    monkeypatch.setattr(Store, "_write", lambda *_: go_on.wait(20))
    with (
        split(model, devices=2, planner="even", recovery=Recovery(store=str(tmp_path), every_tokens=2)) as engine,
        caplog.at_level(logging.WARNING),
    ):
        began = time.monotonic()
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)
        assert time.monotonic() - began < 15.0
        go_on.set()
    assert [r.message for r in caplog.records if "gives no answer" in r.message]


def test_two_engines_may_have_one_store(tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model, recovery, forget = family_model("llama"), Recovery(store=str(tmp_path), every_tokens=4), Store.forget
    for forgets, there in ((lambda _: None, 1), (lambda _: None, 2), (forget, 2)):
        monkeypatch.setattr(Store, "forget", forgets)
        with split(model, planner="even", recovery=recovery) as engine:
            list(engine.stream(PROMPT, GREEDY))
        assert len(list(tmp_path.rglob("manifest-000000000.json"))) == there, "each deletes its own"


def test_a_device_without_a_way_to_the_store_reads_the_tokens_again(tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")

    def none_here(*_: object) -> int:
        raise InputError("checkpoint store", expected="s3", actual="no such file system", remedy="install it")

    monkeypatch.setattr(Store, "restore", none_here)
    with split(model, planner="even", recovery=Recovery(store=str(tmp_path), every_tokens=4)) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, GREEDY)):
            tokens.append(token)
            if n == 15:
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert engine.faults[0].replayed >= 15 + len(PROMPT)


@pytest.mark.parametrize(("planner", "victim"), [("even", "cloud0"), ("edge_only", "edge0")], ids=["one", "the_only"])
def test_a_device_that_comes_back_with_other_weights_is_refused(planner, victim, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model, other = family_model("llama"), StateDictSource(family_model("llama"))
    recovery = Recovery(backoff=Backoff(budget_s=2.0))
    with (
        split(model, devices=2, planner=planner, recovery=recovery) as engine,
        pytest.raises(DeviceLost, match="same checkpoint") as lost,
    ):
        for n, _ in enumerate(engine.stream(PROMPT, GREEDY)):
            if n == 3:
                threads_of(engine)._source = other
                threads_of(engine).kill(victim)
    assert f"{victim}'" in str(lost.value), "by name"


def test_who_was_left_out_and_comes_back_with_other_weights_stays_out(monkeypatch, caplog):
    slow_devices(monkeypatch, 0.02)
    model, other = family_model("llama"), StateDictSource(family_model("llama"))
    with (
        split(model, devices=3, planner="even", recovery=Recovery(replan=replan(model))) as engine,
        caplog.at_level(logging.WARNING),
    ):
        tokens = []
        for n, token in enumerate(engine.stream(PROMPT, Sampling(max_new_tokens=60))):
            tokens.append(token)
            if n == 5:
                threads_of(engine)._source = other
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, 60) and "cloud0" not in engine.route.devices
    said = [r.message for r in caplog.records if "cloud0" in r.message and "same checkpoint" in r.message]
    assert len(said) == 1, "once, and why"


def test_messages_twice_late_and_in_the_wrong_order_have_no_effect():
    model = family_model("llama")
    rng = random.Random(0)
    with split(model, devices=3, seed=1) as engine:
        for host in threads_of(engine).hosts.values():
            _unruly(host.wire, rng)
        assert list(engine.stream(PROMPT, DRAWN)) == list(engine.stream(PROMPT, DRAWN))
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)
        assert sum(h.wire.dropped for h in threads_of(engine).hosts.values()) > 20


def _unruly(wire, rng) -> None:
    """Repeats frames, and repeats old ones later."""
    put, old = wire.put, list[tuple[Any, ...]]()

    def unruly(peer, start, payload):
        for stale in [o for o in old if rng.random() < 0.1]:
            put(*stale)
        put(peer, start, payload)
        if rng.random() < 0.3:
            put(peer, start, bytes(payload))
        old.append((peer, start, bytes(payload)))
        del old[:-20]

    wire.put = unruly


def test_kv_comes_from_itself_then_from_the_first_living_holder_then_from_nowhere():
    def layer(shares):
        return LayerPlacement(Shares.of(shares), Shares.whole(8, "a"))

    def placement(*layers):
        return Placement(tuple(layers), (DeviceId("a"),), Shares.whole(9, "a"))

    def piece(layer, start, stop):
        return (KvPiece(layer, Range(start, stop)),)

    now = placement(layer({"a": [(0, 2)], "b": [(2, 4)]}), layer({"a": [(0, 4)], "b": [(0, 4)]}))
    then = placement(layer({"a": [(0, 3)], "b": [(3, 4)]}), layer({"c": [(0, 4)]}))
    assert kv_sources(now, then, "a", frozenset()) == {"a": piece(0, 0, 2), "b": piece(0, 2, 3)}
    assert kv_sources(now, then, "b", frozenset()) == {"b": piece(0, 3, 4)}
    assert kv_sources(now, then, "c", frozenset()) == {"a": piece(1, 0, 4)}
    assert kv_sources(now, then, "c", frozenset({"a"})) == {"b": piece(1, 0, 4)}
    assert kv_sources(now, then, "a", frozenset({"b"})) == {"a": piece(0, 0, 2), None: piece(0, 2, 3)}
    assert kv_sources(now, now, "b", frozenset({"b"})) == {None: piece(0, 2, 4), "a": piece(1, 0, 4)}


def test_youngs_period():
    assert best_period_tokens(cost_s=0.01, failures_per_s=1 / 3600, tpot_s=0.1) == 85
    assert best_period_tokens(cost_s=0.0, failures_per_s=1.0, tpot_s=0.1) == 1


def test_backoff_looks_often_while_a_fault_is_young_then_doubles():
    waits = Backoff(often_s=0.0, young_s=0.001, first_s=1.0, most_s=4.0, budget_s=60.0).waits(random.Random(0))
    seen = [w for _, w in zip(range(400), waits, strict=False)]
    late = [w for w in seen if w > 0]
    assert seen[0] == 0.0
    for n, w in enumerate(late[:5]):
        d = min(4.0, 2.0**n)
        assert d / 2 <= w <= d
    assert list(Backoff(budget_s=0.0).waits()) == []


def test_a_manifest_names_what_is_there(tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.02)
    model = family_model("llama")
    monkeypatch.setattr(Store, "forget", lambda *_: None)
    with split(model, devices=2, planner="even", recovery=Recovery(store=str(tmp_path), every_tokens=4)) as engine:
        assert len(list(engine.stream(PROMPT, GREEDY))) == NEW_TOKENS
    (store,) = (Store(str(folder)) for folder in tmp_path.iterdir())
    files, ids = store.manifest()
    assert len(ids[0]) > len(PROMPT) and ids[0][: len(PROMPT)] == PROMPT
    assert {Path(f.path).exists() for f in files} == {True} and files[-1].stop <= len(ids[0])
    assert all(store.read(f) for f in files)
    parts = sorted(tmp_path.rglob("manifest-*.json"))
    assert len(parts) >= 4
    sizes = [p.stat().st_size for p in parts]
    assert max(sizes) < 2 * min(sizes), "each tells what is new only"


def test_a_manifest_leaves_out_what_a_later_checkpoint_has_overtaken(tmp_path):
    store = Store(str(tmp_path))

    def saved(start, stop):
        return Saved(f"x-{start}-{stop}", "0", 1, start, stop, ((0, 0, 1),))

    ids = [list(range(100, 130))]
    for start, stop in ((0, 4), (4, 8), (8, 12), (4, 10), (10, 14)):
        store.write_manifest(1, start, [saved(start, stop)], [ids[0][: stop + 1]])
    files, found = store.manifest()
    assert [(f.start, f.stop) for f in files] == [(0, 4), (4, 10), (10, 14)]
    assert found == [ids[0][:15]]


@pytest.mark.full  # it starts real processes, which costs 20 CPU seconds
def test_an_engine_that_closes_while_a_device_comes_back_leaves_nothing(tmp_path):
    import psutil

    from splitray.runtime.fleet import ProcessFleet
    from splitray.runtime.launch import launch_engine

    before, fleet = set(psutil.Process().children(recursive=True)), ProcessFleet()
    with launch_engine(model="tiny", devices=2, fleet=fleet, recovery=Recovery(replan="best_device")) as engine:
        for n, _ in enumerate(engine.stream(PROMPT, GREEDY)):
            if n == 5:
                psutil.Process(fleet.pid("cloud0")).kill()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_devices_die_while_others_come_back(monkeypatch):
    slow_devices(monkeypatch, 0.003)
    model, rng = family_model("llama"), random.Random(1)
    sampling = Sampling(max_new_tokens=40, temperature=0.8, seed=2)
    with split(model, devices=3, planner="even", recovery=Recovery(replan="best_device", restarts=1000)) as engine:
        wanted = list(engine.stream(PROMPT, sampling))
        for run in range(40):
            moments, got = rng.sample(range(1, 38), rng.choice([1, 2])), []
            for n, token in enumerate(engine.stream(PROMPT, sampling)):
                got.append(token)
                if n in moments:
                    threads_of(engine).kill(rng.choice(list(engine.members.endpoints)))
            assert got == wanted, f"run {run}"
        assert len(engine.faults) > 10


def test_a_fault_behind_the_last_token_adds_none(monkeypatch):
    model, reply = family_model("llama"), Members.reply
    with split(model, devices=2, planner="even", recovery=Recovery()) as engine:
        lost = iter([True])

        def late(members, device, frame):
            if engine.progress is not None and engine.progress.ended and next(lost, False):
                raise DeviceLost(f"{device} fell silent behind the last token")
            return reply(members, device, frame)

        monkeypatch.setattr(Members, "reply", late)
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)
        assert len(engine.faults) == 1
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)


def test_a_run_is_given_up_while_a_device_is_dead_and_the_next_one_works():
    model = family_model("llama")
    with split(model, devices=2, planner="even", recovery=Recovery()) as engine:
        stream = cast(Generator[int, None, None], engine.stream(PROMPT, Sampling(max_new_tokens=100)))
        next(stream)
        threads_of(engine).kill("cloud0")
        stream.close()
        assert list(engine.stream(PROMPT, GREEDY)) == greedy(model, PROMPT, NEW_TOKENS)
