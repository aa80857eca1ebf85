"""Checkpoints: slices equal the whole tensors, bytes are counted, damage is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import FAMILIES, family_model, save_family

from splitray.arch import Range
from splitray.errors import ModelError
from splitray.model.reading import read_arch, read_config
from splitray.model.source import Checkpoint
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_family("llama", folder)


def test_slices_along_both_axes_equal_the_whole_tensor_and_are_counted(llama):
    folder, model = llama
    checkpoint = Checkpoint(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = model.state_dict()[name]
    rows = checkpoint.read(name, axis=0, ranges=[Range(0, 3), Range(7, 9)])
    columns = checkpoint.read(name, axis=1, ranges=[Range(5, 20)])
    assert torch.equal(rows, torch.cat([whole[0:3], whole[7:9]]))
    assert torch.equal(columns, whole[:, 5:20]) and columns.is_contiguous()
    assert checkpoint.bytes_read == 4 * (5 * whole.shape[1] + 15 * whole.shape[0])


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_saved_checkpoints_of_every_family_are_read_in_slices(family, max_shard_size, tmp_path):
    """Single files and indexed shards, renamed, fused and tied tensors, as save_pretrained writes them."""
    model = save_family(family, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "20KB")
    config = read_config(tmp_path)
    arch, layout = read_arch(config)
    topology = Topology.uniform(3)
    placement = make_planner("random", seed=2).propose(ClusterState(arch=arch, topology=topology))
    ids = torch.arange(3, 11)[None]
    with torch.inference_mode():
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    with Engine(fleet=ThreadFleet(deadline_s=20), model_path=tmp_path, arch=arch, layout=layout, topology=topology,
                placement=placement, lean=False) as engine:  # fmt: skip
        got = engine.step(Forward(session=1, ids=ids, position=0, keep=8, capacity=8))
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


def test_each_device_reads_its_slices_and_no_more(llama):
    folder, _ = llama
    arch, layout = read_arch(read_config(folder))
    topology = Topology.uniform(2)
    placement: Placement = make_planner("even").propose(ClusterState(arch=arch, topology=topology))
    with Engine(fleet=ThreadFleet(), model_path=folder, arch=arch, layout=layout, topology=topology,
                placement=placement) as engine:  # fmt: skip
        stats = engine.stats()
        list(engine.stream([1, 2, 3], Sampling(max_new_tokens=2)))
    for device in topology.ids:
        assert stats[device]["checkpoint_bytes_read"] == stats[device]["weight_bytes"]


def test_copies_of_a_model_have_one_fingerprint_and_another_model_has_another(llama, tmp_path):
    folder, _ = llama
    shutil.copytree(folder, tmp_path / "copy")
    save_family("llama", tmp_path / "other", seed=1)
    prints = [Checkpoint(f).fingerprint() for f in (folder, tmp_path / "copy", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


def test_devices_with_different_weights_are_refused(llama, tmp_path):
    from dataclasses import replace

    folder, _ = llama
    save_family("llama", tmp_path, seed=1)
    arch, layout = read_arch(read_config(folder))
    topology = Topology.uniform(2)
    other = replace(topology.devices[1], model_path=str(tmp_path))
    topology = replace(topology, devices=(topology.devices[0], other))
    placement = make_planner("even").propose(ClusterState(arch=arch, topology=topology))
    with pytest.raises(ModelError, match="the same checkpoint on every device"):
        Engine(fleet=ThreadFleet(), model_path=folder, arch=arch, layout=layout, topology=topology,
               placement=placement)  # fmt: skip


def _damaged(folder, tmp_path, damage):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors or its index"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "complete"),
        (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "gone.safetensors"}})), "gone.safetensors"),
    ],
    ids=["no weights", "no config", "truncated", "empty index", "missing shard"],
)  # fmt: skip
def test_missing_or_truncated_files_are_refused_with_what_is_wrong(llama, tmp_path, damage, message):
    with pytest.raises(ModelError, match=message):
        Checkpoint(_damaged(llama[0], tmp_path, damage))


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(tmp_path):
    from safetensors.torch import save_file

    model = family_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k and k != "lm_head.weight"}
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj.weight"):
        Checkpoint(tmp_path).read("model.layers.1.mlp.up_proj.weight")
