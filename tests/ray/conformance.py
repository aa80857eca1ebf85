"""One suite for every fleet, so that threads and processes prove what actors must do too.

A kind of fleet brings a `Lab`; a test class inherits `Conformance` and gives a fixture `lab` of scope `class`.
"""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import family_model
from transformers import PreTrainedModel

from splitray.errors import DeviceLost, InputError, PlacementError
from splitray.placement import Placement
from splitray.runtime.engine.engine import Engine
from splitray.runtime.fleet import Fleet, ProcessFleet, ThreadFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT = [5, 61, 33, 8, 90, 17, 44]
NEW_TOKENS = 12
LONG = 6000  # tokens: a run that nobody waits for the end of
SOON_S = 8.0  # a busy machine is slow, but no deadline of 60 s may be what ends a run
A, B, C = (str(i) for i in Topology.uniform(3).ids)
LAYERS, GROUPS, COLUMNS, ROWS = 3, 3, 40, 97
STATE_BYTES = 48 * 4
FEW = ("one device", "the same with the head split", "a device with nothing in a layer")


class Lab(ABC):
    """One kind of fleet: how to make it, how to kill a device of it, and what it must not leave behind."""

    @abstractmethod
    def fleet(self) -> Fleet:
        """A fleet that has not started."""

    @abstractmethod
    def kill(self, fleet: Any, device: str) -> None:
        """End a device without warning."""

    @abstractmethod
    def traces(self, fleet: Any) -> Callable[[], list[Any]]:
        """A function that lists what is still there of the running fleet, to be called after its close."""


class ThreadLab(Lab):
    def fleet(self) -> ThreadFleet:
        return ThreadFleet(deadline_s=20)

    def kill(self, fleet: ThreadFleet, device: str) -> None:
        fleet.hosts[device].close()

    def traces(self, fleet: ThreadFleet) -> Callable[[], list[Any]]:
        mine = [*fleet._threads, *(host._listener._thread for host in fleet.hosts.values())]
        return lambda: [t for t in mine if t.is_alive()]


class ProcessLab(Lab):
    """Fleets whose devices are processes of this machine and which know their pids."""

    def fleet(self) -> Fleet:
        return ProcessFleet()

    def kill(self, fleet: Any, device: str) -> None:
        os.kill(fleet.pid(device), signal.SIGKILL)

    def traces(self, fleet: Any) -> Callable[[], list[Any]]:
        mine = [psutil.Process(fleet.pid(d)) for d in self.devices(fleet)]
        return lambda: [p for p in mine if p.is_running()]

    def devices(self, fleet: Any) -> Sequence[str]:
        return list(fleet._processes)


def small_model(folder: Path) -> PreTrainedModel:
    """A random llama with room for a long run."""
    model = family_model("llama")
    model.config.max_position_embeddings = LONG + 100
    model.save_pretrained(folder)
    return model


def expected(model: PreTrainedModel, **options: Any) -> list[int]:
    """What transformers generates; its end token ignored."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


def placed(*layers: tuple[dict, dict], embedding: Sequence[str] = (A,), head: dict | None = None) -> Placement:
    document = {
        "layers": [{"attention": attention, "ffn": ffn} for attention, ffn in layers],
        "embedding": list(embedding),
        "head": head or {A: [[0, ROWS]]},
    }
    return Placement.from_document(document)


def on(device: str, total: int) -> dict[str, list[list[int]]]:
    return {device: [[0, total]]}


HEADS_2 = {A: [[0, 2]], B: [[2, 3]]}
FFN_2 = {A: [[0, 17]], B: [[17, 40]]}
HEADS_3 = {A: [[0, 1]], B: [[1, 2]], C: [[2, 3]]}
FFN_3 = {A: [[0, 5], [30, 40]], B: [[5, 6]], C: [[6, 30]]}
COPIES = {A: [[0, 3]], B: [[0, 3]]}
ALL_ON_A = (on(A, GROUPS), on(A, COLUMNS))

# Each row: the placement; its exchanges, messages and bytes a token, counted by hand from the exchange rule (None:
# compared with the Route alone). FEW are what a fleet that starts slowly has to show.
PLACEMENTS: dict[str, tuple[Placement, tuple[int, int, int] | None]] = {
    "one device": (placed(*[ALL_ON_A] * 3), (0, 0, 0)),
    "a layer cut": (
        placed(ALL_ON_A, *[(on(B, GROUPS), on(B, COLUMNS))] * 2, head=on(B, ROWS)),
        (2, 2, STATE_BYTES + 4),
    ),
    "heads and FFN partitioned": (placed(*[(HEADS_2, FFN_2)] * 3), (7, 12, 12 * STATE_BYTES)),
    "attention replicated, FFN partitioned": (placed(*[(COPIES, FFN_2)] * 3), (4, 6, 6 * STATE_BYTES)),
    "the same with the head split": (
        placed(*[(COPIES, FFN_2)] * 3, head={A: [[0, 60]], B: [[60, 97]]}),
        (5, 8, 7 * STATE_BYTES + 8),
    ),
    "three devices, uneven": (
        placed(*[(HEADS_3, FFN_3)] * 3, head={C: [[0, 50]], A: [[50, 60]], B: [[60, 97]]}),
        None,
    ),
    "a device with nothing in a layer": (
        placed(
            (HEADS_3, FFN_3),
            ({A: [[0, 1], [2, 3]], C: [[1, 2]]}, {A: [[0, 13]], C: [[13, 40]]}),
            (on(B, GROUPS), {B: [[0, 30]], C: [[30, 40]]}),
            embedding=(A, B),
            head=on(C, ROWS),
        ),
        None,
    ),
    "an origin that holds nothing": (
        placed(*[(on(B, GROUPS), on(C, COLUMNS))] * 3, embedding=(B,), head=on(C, ROWS)),
        (6, 7, 5 * STATE_BYTES + 8),
    ),
}


class Conformance:
    """What every fleet promises. To start processes takes seconds: tests share one engine for each placement."""

    placements: tuple[str, ...] = tuple(PLACEMENTS)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "engine" in metafunc.fixturenames:
            metafunc.parametrize("engine", self.placements, indirect=True, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
        folder = tmp_path_factory.mktemp("model")
        return small_model(folder), folder

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, request: pytest.FixtureRequest, lab: Lab, model: tuple[PreTrainedModel, Path]) -> Iterator[Engine]:
        fleet = lab.fleet()
        engine = launched(model[1], fleet, PLACEMENTS[request.param][0])
        traces = lab.traces(fleet)
        yield engine
        closed_without_a_trace(engine, traces)

    def test_greedy_tokens_are_those_of_transformers(self, model, engine):
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == expected(model[0])

    def test_a_token_costs_what_the_route_says(self, engine, request):
        list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)))
        report, route = engine.report, engine.route
        counted = (report.messages_per_token, report.bytes_per_token)
        assert counted == (route.messages_per_token, route.bytes_per_token(engine.arch))
        by_hand = PLACEMENTS[request.node.callspec.params["engine"]][1]
        if by_hand is not None:
            assert (route.exchanges_per_token, *counted) == by_hand

    def test_a_seed_gives_the_samples_of_transformers(self, model, engine):
        choice: dict[str, Any] = {"temperature": 1.3, "top_k": 50, "top_p": 0.95}
        torch.manual_seed(11)
        wanted = expected(model[0], do_sample=True, **choice)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, seed=11, **choice)
        assert [list(engine.stream(PROMPT, sampling)) for _ in range(2)] == [wanted] * 2

    def test_a_stream_closed_early_cancels_its_run_and_the_next_one_works(self, model, engine):
        stream = engine.stream(PROMPT, Sampling(max_new_tokens=LONG))
        first = [next(stream) for _ in range(3)]
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < SOON_S
        tokens = list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)))
        assert tokens == expected(model[0])
        assert first == tokens[:3]
        assert all(s["kv_bytes"] == 0 for s in engine.stats().values()), "a run that has ended keeps no KV"

    @pytest.mark.parametrize(
        ("prompt", "new_tokens"),
        [([], 1), ([ROWS], 1), ([-1], 1), (PROMPT, LONG + 100)],
        ids=["an empty prompt", "an id past the vocabulary", "a negative id", "more than the context"],
    )
    def test_bad_input_is_refused_and_the_engine_goes_on(self, model, engine, prompt, new_tokens):
        with pytest.raises(InputError) as refused:
            list(engine.stream(prompt, Sampling(max_new_tokens=new_tokens)))
        assert refused.value.remedy
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=2))) == expected(model[0])[:2]

    def test_a_placement_that_does_not_fit_is_refused_before_anything_starts(self, model, lab):
        fleet = lab.fleet()
        with pytest.raises(PlacementError):
            launched(model[1], fleet, placed(*[ALL_ON_A] * 2))
        assert fleet.dead() == {}
        fleet.close()

    def test_a_device_killed_in_a_run_is_told_within_seconds_and_nothing_is_left(self, model, lab):
        fleet = lab.fleet()
        engine = launched(model[1], fleet, PLACEMENTS["a layer cut"][0])
        traces = lab.traces(fleet)
        try:
            assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == expected(model[0])
            stream = engine.stream(PROMPT, Sampling(max_new_tokens=LONG))
            for _ in range(3):
                next(stream)
            lab.kill(fleet, B)
            started = time.monotonic()
            with pytest.raises(DeviceLost, match=B):
                for _ in stream:
                    pass
            assert time.monotonic() - started < SOON_S
            with pytest.raises(DeviceLost, match="cannot run any more"):
                next(engine.stream(PROMPT, Sampling(max_new_tokens=1)))
        finally:
            closed_without_a_trace(engine, traces)


def closed_without_a_trace(engine: Engine, traces: Callable[[], list[Any]]) -> None:
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < SOON_S
    assert eventually(lambda: not traces()), f"left after close(): {traces()}"
    engine.close()


def eventually(true: Callable[[], bool], within_s: float = SOON_S) -> bool:
    """Whether something comes true soon."""
    give_up = time.monotonic() + within_s
    while not true():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def launched(folder: Path, fleet: Fleet, placement: Placement) -> Engine:
    """An engine over devices A, B and C, or those of them that the placement needs."""
    return launch_engine(model=folder, topology=Topology.uniform(3), placement=placement, fleet=fleet)
