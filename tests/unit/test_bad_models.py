"""Folders that are wrong, by the command: exit code 2, what is wrong, what to do, and no device starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import GQA, MORE, save_family
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from splitray.commands.cli import app
from splitray.model.checked import check_weights

EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("no_device_starts")
LIES: dict[str, dict[str, tuple[object, str]]] = {
    "llama": {
        "hidden_size": (96, r"embed_tokens.*shape \[97, 96\].*\[97, 48\]"),
        "num_attention_heads": (-1, r"config.json: expected a config of which transformers makes.*negative"),
        "num_hidden_layers": (0, "num_hidden_layers: expected 1 to 10000; got 0"),
        "hidden_act": ("none_such", "transformers makes a model of llama.*none_such"),
        "layer_types": (["banana"] * 3, "config of llama that transformers reads"),
        "model_type": ("gpt2", r"transformer\.wte\.weight.*use the config.json that belongs"),
        "attention_bias": (True, r"a tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
    },
    "gpt_oss": {
        "num_local_experts": (5, r"shape \[5"),
        "intermediate_size": (41, "experts.*shape"),
        "num_experts_per_tok": (9, "runs a small model.*out of range.*correct it"),
        "sliding_window": (None, "sliding_window"),
        "head_dim": (0, "transformers makes a model of gpt_oss"),
    },
    "deepseek_v3": {
        "kv_lora_rank": (13, r"kv_\w+.*shape"),
        "n_routed_experts": (6, r"experts|gate.*shape"),
        "first_k_dense_replace": (0, r"model\.layers\.0\.mlp"),
        "n_shared_experts": (2, r"shared_experts.*shape"),
        "n_group": (0, "runs a small model"),
        "v_head_dim": (12, "shape"),
    },
    "qwen2_moe": {
        "num_experts": (8, r"shape \[8"),
        "shared_expert_intermediate_size": (31, r"shared_expert.*shape \[31"),
        "mlp_only_layers": ([1], r"model\.layers\.1\.mlp"),
        "decoder_sparse_step": (0, "transformers makes a model of qwen2_moe"),
        "moe_intermediate_size": (25, "experts.*shape"),
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family in one file, and one of the first in shards."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MORE, "qwen2_moe", {**GQA, **EXPERTS, "shared_expert_intermediate_size": 32})
        for family in LIES:
            found[family] = tmp_path_factory.mktemp(family)
            save_family(family, found[family])
    found["shards"] = tmp_path_factory.mktemp("shards")
    save_family("llama", found["shards"], max_shard_size="20KB")
    return found


def refused(folder: Path) -> str:
    """What the command says of it."""
    arguments = ["generate", "--model", str(folder), "--prompt-ids", "5,6", "--runtime", "local"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.stderr
    assert "What to do: " in result.stderr
    return result.stderr


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, lies in LIES.items() for n in lies])
def test_a_config_that_lies_is_refused_by_what_is_wrong(folders, tmp_path, family, name):
    folder, (value, said) = tmp_path / "model", LIES[family][name]
    shutil.copytree(folders[family], folder)
    values = json.loads((folder / "config.json").read_text())
    if name == "num_hidden_layers":
        values.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**values, name: value}))
    assert re.search(said, refused(folder), re.DOTALL)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard that is missing": (lambda f: shards(f)[1].unlink(), "no model-00002-of-"),
    "a shard cut short": (
        lambda f: write(shards(f)[1], shards(f)[1].read_bytes()[:-9]), "model-00002-of-.*complete safetensors file"),
    "an empty shard": (lambda f: write(shards(f)[0], b""), "model-00001-of-.*complete"),
    "a shard of noise": (lambda f: write(shards(f)[0], b"\xff" * 5000), "model-00001-of-.*complete"),
    "a shard that is another one": (
        lambda f: shutil.copy(shards(f)[0], shards(f)[1]), f"model-00002-of-.*a tensor {Q}"),
    "an index that leaves a shard out": (
        lambda f: change_index(f, lambda m: [m.pop(k) for k in [k for k in m if m[k] == m[Q]]]), f"a tensor {Q}"),
    "an index of files elsewhere": (
        lambda f: change_index(f, lambda m: m.update({Q: "/etc/passwd"})), "files in its folder; got /etc/passwd"),
    "an index above the folder": (
        lambda f: change_index(f, lambda m: m.update({Q: "../x.safetensors"})), r"files in its folder; got \.\./x"),
    "an index without files": (lambda f: change_index(f, lambda m: m.clear()), "names of files.*none"),
    "whole numbers for weights": (
        lambda f: change_tensors(shards(f)[1], lambda t: t.update({K: t[K].long()})), f"{K} in model-00002-of-.*I64"),
    "a weight with its scale": (
        lambda f: change_tensors(shards(f)[1], lambda t: t.update({K + "_scale_inv": torch.ones(1, 1)})),
        f"{K}_scale_inv in model-00002-of-.*quantised"),
    "an adapter beside the weights": (lambda f: write(f / "adapter_config.json", b"{}"), "adapter_config.json.*merge"),
    "a config in other bytes": (lambda f: write(f / "config.json", b"\x80"), "config.json: expected a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_files_that_are_damaged_or_do_not_belong_together_are_refused(folders, tmp_path, what):
    folder, (damage, said) = tmp_path / "model", DAMAGES[what]
    shutil.copytree(folders["shards"], folder)
    damage(folder)
    assert re.search(said, refused(folder), re.DOTALL)


def test_of_two_sets_of_weights_the_one_that_is_read_is_named(folders, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(folders["shards"], folder)
    shutil.copy(folders["llama"] / "model.safetensors", folder)
    check_weights(folder)
    assert f"model.safetensors is read, as transformers does, and not what {INDEX} names" in caplog.text
    shutil.copy(folders["qwen2_moe"] / "model.safetensors", folder)
    assert "use the config.json that belongs to these weights" in refused(folder)
