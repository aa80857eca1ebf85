"""Room for the whole request: weights and KV of prompt and answer are planned, and what cannot fit is said in bytes."""

from dataclasses import replace
from typing import Any

import pytest

from splitray.cost import memory_bytes
from splitray.errors import DeviceLost, InputError
from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.launch import decide, launch_engine, read_model
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT = [5, 17, 60]


def with_room(num_bytes: float) -> Topology:
    topology = Topology.uniform(2)
    return replace(topology, devices=tuple(replace(d, memory_bytes=num_bytes) for d in topology.devices))


def needed(tokens: int) -> int:
    arch, _, _ = read_model("tiny")
    placement, _ = decide(arch, with_room(1e12), planner="even", placement=None)
    return max(memory_bytes(placement, arch, tokens).values())


@pytest.mark.parametrize("by", ["planner", "placement"])
def test_what_has_no_room_for_its_kv_is_refused_in_bytes(by):
    arch, _, _ = read_model("tiny")
    even, _ = decide(arch, with_room(1e12), planner="even", placement=None)
    how: dict[str, Any] = {by: {"planner": "even", "placement": even}[by]}
    with pytest.raises(InputError, match="memory") as refused:
        launch_engine(model="tiny", topology=with_room(needed(100)), runtime="local", context=400, **how)
    assert "KV of 400 tokens" in refused.value.expected and f"{needed(400):,} bytes" in refused.value.actual


def test_what_just_fits_runs_and_a_longer_request_is_refused_alone():
    with launch_engine(
        model="tiny", topology=with_room(needed(40)), planner="even", runtime="local", context=40
    ) as engine:
        wanted = list(engine.stream(PROMPT, Sampling(max_new_tokens=37)))
        with pytest.raises(InputError, match="within the context of 40 tokens"):
            list(engine.stream(PROMPT, Sampling(max_new_tokens=38)))
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=37))) == wanted


def test_a_context_is_never_longer_than_the_models():
    arch, _, _ = read_model("tiny")
    with launch_engine(model="tiny", devices=1, runtime="local", context=10**9) as engine:
        assert engine.arch.context_tokens == arch.context_tokens


def test_a_planner_is_told_of_the_context():
    """The cloud has room for the weights, not for the KV as well: the exact program leaves some on the edge."""
    arch, _, _ = read_model("tiny")
    topology = with_room(needed(400))
    placement, _ = decide(arch, topology, planner="drift_plus_penalty", placement=None, context_tokens=400)
    assert max(memory_bytes(placement, arch, 400).values()) <= needed(400)


def test_a_device_that_is_slow_to_start_is_told_as_that():
    fleet = ProcessFleet(start_s=0.05)
    with pytest.raises(DeviceLost, match=r"edge0: not up after 0.05 s; .*start_s"):
        launch_engine(model="tiny", devices=1, fleet=fleet)
    assert fleet.dead() == {}, "nothing is left"
