"""Engines on threads with random placements: what the exactness tests share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.model.reading import read_arch
from splitray.model.state_dict_source import StateDictSource
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.device.decode import DecodeLoop
from splitray.runtime.device_formats import on_devices
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.epoch import Next
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.run_report import RunReport
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.selftest import self_test
from splitray.topology import DeviceId, Link, Topology

SOON_S = 20.0


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of the unsplit model, its end token ignored."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return out[0, len(prompt) :].tolist()


def slow_devices(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let each token take its time: small models are else at their end before anything can happen to them."""
    at_once = DecodeLoop._emit

    def later(loop: DecodeLoop, ids_B: torch.Tensor) -> None:
        time.sleep(seconds)
        at_once(loop, ids_B)

    monkeypatch.setattr(DecodeLoop, "_emit", later)


@contextmanager
def split(
    model: PreTrainedModel,
    *,
    devices: int = 2,
    planner: str = "random",
    seed: int = 0,
    placement: Placement | None = None,
    lean: bool | None = None,
    topology: Topology | None = None,
    codec: Codec = "none",
    channel: NoisyChannel | None = None,
    recovery: Recovery | None = None,
    weights: str = "float32",
    sums: str = "fixed",
) -> Iterator[Engine]:
    """The model in memory, split over threads."""
    arch, layout = read_arch(model.config)
    lean = self_test(model.config) if lean is None else lean
    where = topology or Topology.uniform(devices)
    arch = on_devices(arch, where, weights, lambda: "float32", sums=sums, lean=lean)
    state = ClusterState(arch=arch, topology=where)
    chosen = placement or make_planner(planner, seed=seed).propose(state)
    fleet = ThreadFleet(source=StateDictSource(model), deadline_s=20)
    with Engine(fleet=fleet, model_path="", arch=arch, layout=layout, topology=where, placement=chosen,
                lean=lean, codec=codec, channel=channel, recovery=recovery) as engine:  # fmt: skip
        yield engine


def report_of(engine: Engine) -> RunReport:
    """What the last run of an engine cost."""
    assert engine.report is not None, "it has run"
    return engine.report


def threads_of(engine: Engine) -> ThreadFleet:
    """The fleet of an engine whose devices are threads."""
    assert isinstance(engine.fleet, ThreadFleet)
    return engine.fleet


def link_of(topology: Topology, source: str, target: str) -> Link:
    """The link between two devices that exchange."""
    link = topology.link(DeviceId(source), DeviceId(target))
    assert link is not None, f"{source} and {target} have no link"
    return link


def another(engine: Engine, seed: int) -> Placement:
    """A random placement on the engine's devices."""
    state = ClusterState(arch=engine.arch, topology=engine.topology)
    return make_planner("random", seed=seed).propose(state)


def moved_while_generating(
    engine: Engine, prompt: list[int], sampling: Sampling, seeds: Iterable[int]
) -> tuple[list[int], list[Next]]:
    """Tokens of a run in which placement after placement takes over, and the migrations: every other one with KV."""
    tokens: list[int] = []
    done: list[Next] = []
    seeds = list(seeds)
    for token in engine.stream(prompt, sampling):
        tokens.append(token)
        if seeds and (not done or done[-1].done.is_set()):
            done.append(engine.migrate(another(engine, seeds.pop(0)), copies_kv=len(done) % 2 == 0))
            assert done[-1].staged.wait(SOON_S)
    assert all(m.done.wait(SOON_S) and m.error is None for m in done)
    return tokens, done


def bytes_read_and_lent(path: Path, prompt: list[int], sampling: Sampling) -> tuple[int, int]:
    """What a device reads of a model that it has, and what comes to it if it has none; the tokens are the same."""
    here = Topology.uniform(2)
    there = replace(here, devices=(here.devices[0], replace(here.devices[1], model_path="/nowhere/to/be/found")))
    found = []
    for where in (here, there):
        with launch_engine(model=path, topology=where, planner="even", fleet=ThreadFleet()) as engine:
            found.append((list(engine.stream(prompt, sampling)), engine.stats()))
    assert found[0][0] == found[1][0]
    read, lent = (stats["cloud0"]["checkpoint_bytes_read"] for _, stats in found)
    return read, lent
