"""The signature: any placement of any supported family gives the tokens of the unsplit model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import cast

import pytest
import torch
from families import FAMILIES, MORE, family_model
from splits import greedy, report_of, split

from splitray.placement import LayerPlacement, Placement, Shares
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.thin(4)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_split_at_random_gives_the_unsplit_tokens_and_the_rules_bytes(family):
    model = family_model(family)
    expected = greedy(model, PROMPT, NEW_TOKENS)
    for devices in (1, 2, 3, 5):
        with split(model, devices=devices, seed=devices + 10) as engine:
            tokens = list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)))
            assert tokens == expected, f"{devices} devices: {engine.placement}"
            assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
            assert report_of(engine).messages_per_token == engine.route.messages_per_token


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_one_device_holds_the_bytes_of_the_model(family):
    """What is not registered would not be counted, nor moved to a GPU."""
    model = family_model(family)
    whole = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    with split(model, devices=1) as engine:
        assert engine.stats()["edge0"]["weight_bytes"] == sum(whole.values())


@pytest.mark.parametrize("devices", [4, 8])
def test_more_devices_than_kv_groups_is_exact(devices):
    model = family_model("llama")
    with split(model, devices=devices, planner="even") as engine:
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == greedy(model, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("lean", [True, False])
def test_lean_and_hf_loops_give_the_same_tokens(lean):
    model = family_model("llama")
    with split(model, devices=3, seed=4, lean=lean) as engine:
        assert {s["lean"] for s in engine.stats().values() if s["weight_bytes"]} == {lean}
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == greedy(model, PROMPT, NEW_TOKENS)


def test_a_prompt_longer_than_a_chunk_is_exact(monkeypatch):
    from splitray.runtime.device import decode

    monkeypatch.setattr(decode, "CHUNK_TOKENS", 4)
    for family in ("llama", "gemma2", "gpt2"):
        model = family_model(family)
        with split(model, devices=3, seed=5) as engine:
            assert list(engine.stream(PROMPT, Sampling(max_new_tokens=6))) == greedy(model, PROMPT, 6)


def test_a_left_padded_batch_in_the_engines_own_loop_equals_transformers():
    model = family_model("gpt2")
    ids = torch.tensor([[0, 0, 0, 5, 17], [9, 8, 7, 6, 5]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:]
    with split(model, devices=3, seed=6) as engine:
        steps = list(engine.stream_batch(ids.tolist(), Sampling(max_new_tokens=6), attention_mask=mask.tolist()))
    assert torch.tensor(steps).T.tolist() == expected.tolist()


@pytest.mark.parametrize("planner", ["even", "random", "fixed_cut:1", "edge_only", "cloud_only"])
def test_sampling_on_the_devices_equals_transformers_sampling_with_the_same_seed(planner):
    model = family_model("qwen3")
    ids = torch.tensor([PROMPT])
    torch.manual_seed(123)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7,
        top_k=20, top_p=0.9, repetition_penalty=1.2, eos_token_id=None, pad_token_id=0,
    )[0, len(PROMPT) :].tolist()  # fmt: skip
    settings = Sampling(
        max_new_tokens=NEW_TOKENS, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=123
    )
    with split(model, devices=3, planner=planner) as engine:
        assert list(engine.stream(PROMPT, settings)) == expected


def test_a_stop_token_ends_the_run_on_every_device_and_the_next_run_works():
    model = family_model("llama")
    expected = greedy(model, PROMPT, NEW_TOKENS)
    stop = expected[4]
    with split(model, devices=5, seed=3) as engine:
        ended = list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS, stop_ids=(stop,))))
        assert ended == expected[: expected.index(stop) + 1]
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == expected


def test_closing_a_stream_cancels_the_run_and_the_next_run_works():
    model = family_model("llama")
    with split(model, devices=3, seed=3) as engine:
        with closing(cast("Generator[int, None, None]", engine.stream(PROMPT, Sampling(max_new_tokens=100)))) as stream:
            next(stream)
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=5))) == greedy(model, PROMPT, 5)


def test_attention_replicated_and_ffn_split_needs_one_exchange_a_layer():
    model = family_model("llama")
    topology = Topology.uniform(2)
    a, b = topology.ids
    arch_layers = model.config.num_hidden_layers
    layer = LayerPlacement(Shares.whole(3, a, b), Shares.of({a: [(0, 13)], b: [(13, 40)]}))
    placement = Placement((layer,) * arch_layers, (a,), Shares.whole(97, a))
    with split(model, topology=topology, placement=placement) as engine:
        assert engine.route.exchanges_per_token == arch_layers + 1
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == greedy(model, PROMPT, NEW_TOKENS)
