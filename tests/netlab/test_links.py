"""Links that are cut, restored and shaped, between device processes in networks of their own."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from lab import NetFleet, NetLab, why_not

from splitray.migration import delay_s, diff
from splitray.placement import Placement, Shares
from splitray.profiling.random_llama import RandomLlama
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.epoch import Next
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

_REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]
PROMPT = list(range(5, 25))
SAMPLING = Sampling(max_new_tokens=200, temperature=0.9, seed=3)
CUT_S = 2.0
SOON_S = 2.0  # after the link is back; half a second on a quiet machine, which is printed
MODEL = RandomLlama(name="netlab", layers=6, hidden=512, heads=8, kv_heads=8, ffn=512, vocab=512, tied=True)
RATE_BYTES_PER_S = 4e6
PAYLOAD = 1448 / 1514  # of a frame, as the shaper counts it
WHOLE_S = 60.0


@pytest.fixture(scope="module")
def lab() -> Iterator[NetLab]:
    with NetLab(["edge0", "cloud0"]) as made:
        yield made
    assert not made.left(), "the laboratory takes itself down"


@pytest.fixture(scope="module")
def engine(lab: NetLab) -> Iterator[Engine]:
    with launch_engine(model="tiny", devices=2, fleet=NetFleet(lab), recovery=Recovery()) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(engine: Engine) -> list[int]:
    return list(engine.stream(PROMPT, SAMPLING))


@pytest.mark.thin(2)
@pytest.mark.parametrize("victim", ["cloud0", "edge0"])
def test_a_link_that_is_cut_for_two_seconds_costs_no_token_and_little_more_than_that(
    lab: NetLab, engine: Engine, wanted: list[int], victim: str
) -> None:
    back: list[float] = []

    def cut() -> None:
        lab.cut(victim)
        time.sleep(CUT_S)
        lab.restore(victim)
        back.append(time.perf_counter())

    got, times = [], []
    for token in engine.stream(PROMPT, SAMPLING):
        got.append(token)
        times.append(time.perf_counter())
        if len(got) == 50:
            threading.Thread(target=cut).start()
    assert got == wanted
    assert all(not f.restarted for f in engine.faults), "nobody died"
    later = min(t for t in times if t > back[0]) - back[0]
    print(f"{victim} cut for {CUT_S:g} s: the next token {later:.2f} s after the link was back")
    assert later < SOON_S


@pytest.mark.full
def test_a_device_that_stays_cut_off_is_left_out_and_gets_back_what_it_held(
    lab: NetLab, engine: Engine, wanted: list[int], monkeypatch
) -> None:
    monkeypatch.setattr(engine.members, "recovery", Recovery(replan="best_device", patience_s=1.0))
    got = []
    try:
        for token in engine.stream(PROMPT, SAMPLING):
            got.append(token)
            if len(got) == 50:
                lab.cut("cloud0")
        assert got == wanted
        assert engine.faults[-1].left_out == ("cloud0",)
    finally:
        lab.restore("cloud0")
    give_up = time.monotonic() + WHOLE_S
    while "cloud0" not in engine.route.devices:
        assert time.monotonic() < give_up, "it comes back"
        time.sleep(0.1)


@pytest.mark.alone
@pytest.mark.full
def test_the_predicted_delay_of_a_migration_over_a_shaped_link(lab: NetLab, tmp_path) -> None:
    """Half of all heads move, one way; and all of them, both ways at once, where the copies are in each other's way.

    While tokens come, theirs go over the same link, but few: each of their exchanges waits behind the copy. What they
    send at the pace before it says nothing, and the prediction leaves them out.
    """
    path = MODEL.write(tmp_path)
    errors: dict[str, list[float]] = {"half, waiting": [], "half, generating": [], "all, waiting": []}
    options: dict[str, Any] = {"planner": "even", "fleet": NetFleet(lab), "recovery": Recovery()}
    prompt = [5 + i % 300 for i in range(512)]
    with launch_engine(model=path, devices=2, **options) as engine:
        even, whole, turned = engine.placement, _gathered(engine), _turned(engine)

        def error_of(after: Placement, stream: Generator[int, None, None] | None = None) -> float:
            before, move = engine.placement, engine.migrate(after)
            if stream is not None:
                for _ in stream:
                    if move.done.is_set():
                        stream.close()
            assert move.done.wait(30) and move.error is None
            return _predicted_s(engine, before, after, move) / move.copy_s - 1

        engine.step(Forward(session=1 << 20, ids=torch.tensor([prompt]), position=0, keep=1, capacity=600))
        with _shaped(lab):
            errors["half, waiting"] = [error_of(after) for after in (whole, even, whole, even)]
            errors["all, waiting"] = [error_of(after) for after in (turned, even)]
        engine.forget(1 << 20)
        for after in (whole, even, whole):
            stream = cast("Generator[int, None, None]", engine.stream(prompt, Sampling(max_new_tokens=400)))
            for _ in range(3):
                next(stream)
            with _shaped(lab):
                errors["half, generating"].append(error_of(after, stream))
    for what, found in errors.items():
        print(f"{what}: predicted over measured delay - 1: {[f'{e:+.0%}' for e in found]}")
    assert abs(statistics.median(errors["half, waiting"])) < 0.5  # 0.2 is wanted, and reached on a quiet machine


@contextmanager
def _shaped(lab: NetLab) -> Iterator[None]:
    """Not while a prompt goes over the links, which would take most of the test."""
    for host in lab.hosts:
        lab.shape(host, RATE_BYTES_PER_S)
    try:
        yield
    finally:
        for host in lab.hosts:
            lab.free(host)


def _predicted_s(engine: Engine, before: Placement, after: Placement, move: Next) -> float:
    positions = move.staged_bytes // max(1, sum(m.kv_bytes for m in diff(before, after, engine.arch, 1)))
    assert positions >= 512, "the whole context moves"
    rate = RATE_BYTES_PER_S * PAYLOAD
    links = tuple(replace(x, bandwidth_bytes_per_s=rate, rtt_s=0.0) for x in engine.topology.links)
    return delay_s(diff(before, after, engine.arch, positions), replace(engine.topology, links=links), staged=True)


def _gathered(engine: Engine) -> Placement:
    """All attention on the second device."""
    heads = Shares.whole(engine.arch.num_kv_heads, engine.topology.ids[1])
    return replace(engine.placement, layers=tuple(replace(x, attention=heads) for x in engine.placement.layers))


def _turned(engine: Engine) -> Placement:
    """The attention of the two devices exchanged: all KV moves."""
    a, b = engine.topology.ids
    layers = tuple(replace(x, attention=Shares.of({a: _plain(x, b), b: _plain(x, a)})) for x in engine.placement.layers)
    return replace(engine.placement, layers=layers)


def _plain(layer, device) -> list[tuple[int, int]]:
    return [(r.start, r.stop) for r in layer.attention.ranges(device)]
