"""A device without the model on its disk gets its slices over the wire from one that has it, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import family_model
from splits import greedy, slow_devices, threads_of

from splitray.errors import ModelError
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT, NEW_TOKENS = [5, 17, 60, 3, 44], 40


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def poor(topology: Topology, *devices: str, path: str = "/nowhere/to/be/found") -> Topology:
    """These devices have no copy."""
    return replace(
        topology,
        devices=tuple(replace(d, model_path=path) if d.id in devices else d for d in topology.devices),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_come_over_the_wire_where_they_are_not_on_the_disk(family, tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.005)
    model = family_model(family)
    model.save_pretrained(tmp_path)
    topology = poor(Topology.uniform(3), "edge0", "cloud1")
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    with launch_engine(
        model=tmp_path, topology=topology, planner="even", fleet=ThreadFleet(), recovery=Recovery()
    ) as engine:
        stats = engine.stats()
        assert stats["edge0"]["checkpoint_bytes_read"] > 0
        moves, tokens = [], []
        for token in engine.stream(PROMPT, sampling):
            tokens.append(token)
            if len(tokens) == 3:
                state = ClusterState(arch=engine.arch, topology=topology)
                moves.append(engine.migrate(make_planner("random", seed=3).propose(state)))
                assert moves[0].staged.wait(20)
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert moves[0].done.is_set() and moves[0].error is None
        with_copy = engine.stats()
    with launch_engine(model=tmp_path, topology=Topology.uniform(3), planner="even", fleet=ThreadFleet()) as engine:
        for device, values in engine.stats().items():
            assert values["checkpoint_bytes_read"] == stats[device]["checkpoint_bytes_read"], "the slices alone"
    assert with_copy["edge0"]["weight_bytes"] > 0


def test_a_model_that_nobody_has_is_refused(tmp_path):
    family_model("llama").save_pretrained(tmp_path)
    topology = poor(Topology.uniform(2), "edge0", "cloud0")
    with pytest.raises(ModelError, match="on none"):
        launch_engine(model=tmp_path, topology=topology, planner="even", fleet=ThreadFleet())


def test_a_lender_that_dies_is_left_for_another(tmp_path, monkeypatch):
    slow_devices(monkeypatch, 0.01)
    model = family_model("llama")
    model.save_pretrained(tmp_path)
    topology = poor(Topology.uniform(3), "edge0")
    with launch_engine(
        model=tmp_path, topology=topology, planner="even", fleet=ThreadFleet(), recovery=Recovery()
    ) as engine:
        tokens = []
        for token in engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)):
            tokens.append(token)
            if len(tokens) == 5:
                threads_of(engine).kill("cloud0")
        assert tokens == greedy(model, PROMPT, NEW_TOKENS) and engine.faults
