"""A request that cannot be sampled ends alone: the engine and its devices go on with the next one."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from families import family_model
from splits import greedy, split
from transformers import PreTrainedModel

from splitray.errors import InputError, Unsampled
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.sampling import Chooser, Sampling, deciding, fill_in

PROMPT = [5, 6, 7, 8]
BAD_ID = 9
NEW_TOKENS = 5


def model_without_numbers_at(token_id: int, value: float) -> PreTrainedModel:
    """A llama with a head of its own in which one token's embedding is no number: prompts without it are fine."""
    model = copy.deepcopy(family_model("mistral"))
    model.get_input_embeddings().weight.data[token_id] = value
    return model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e-40),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_p", math.inf),
        ("top_k", -1),
        ("top_k", 2**70),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("seed", 2**70),
        ("max_new_tokens", 2**70),
    ],
)
def test_parameters_that_no_token_can_be_chosen_with_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        Sampling(**cast("dict[str, Any]", {"max_new_tokens": 1, name: value}))


def test_small_and_large_parameters_choose_among_finite_scores():
    logits = torch.tensor([[1.0, 40.0, -3.0]])
    changes: list[dict[str, Any]] = [{"temperature": 1e-30}, {"temperature": 1e300}, {"temperature": 1, "top_p": 1e-40}]
    for change in changes:
        chooser = Chooser(Sampling(max_new_tokens=1, **change), torch.tensor([[1]]))
        assert int(chooser.from_logits(logits)) in (0, 1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("devices", "recovers"), [(1, False), (3, False), (3, True)])
def test_logits_that_are_no_numbers_end_one_request_and_not_the_engine(value, devices, recovers):
    model = model_without_numbers_at(BAD_ID, value)
    expected = greedy(model, PROMPT, NEW_TOKENS)
    with split(model, devices=devices, seed=4, lean=True, recovery=Recovery() if recovers else None) as engine:
        for temperature, most in ((0.0, 1), (0.0, NEW_TOKENS), (0.7, 1), (0.7, NEW_TOKENS)):
            with pytest.raises(Unsampled, match="no token can be chosen"):
                list(engine.stream([5, BAD_ID, 7], Sampling(max_new_tokens=most, temperature=temperature)))
            assert list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS))) == expected
        assert engine.lost is None and engine.faults == []
        assert all(s["kv_bytes"] == 0 for s in engine.stats().values())


@pytest.mark.parametrize("placement_seed", [1, 2])
def test_parameters_that_leave_no_finite_score_end_one_request_and_not_the_engine(placement_seed):
    model = family_model("llama")
    with split(model, devices=3, seed=placement_seed, lean=True) as engine:
        wrong = Sampling(max_new_tokens=NEW_TOKENS, temperature=1e-30, repetition_penalty=1e-30)
        for _ in range(2):
            with pytest.raises(InputError, match="sampling parameters"):
                list(engine.stream(PROMPT, wrong))
            right = Sampling(max_new_tokens=NEW_TOKENS)
            assert list(engine.stream(PROMPT, right)) == greedy(model, PROMPT, NEW_TOKENS)
        assert engine.lost is None


SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 1, "top_p": 0.3},
    {"temperature": 3e7, "top_k": 7, "repetition_penalty": 1.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "repetition_penalty": 2.0},
    {"temperature": 0.9, "top_k": 5, "repetition_penalty": 0.5},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["apart", "many that are alike", "one that is no number"])
def test_the_best_rows_of_each_holder_choose_as_all_rows_do(settings, kind):
    vocab, batch = 600, 3
    drawn = torch.Generator().manual_seed(5)
    for seed in range(20):
        logits_BV = torch.randn(batch, vocab, generator=drawn) * 4
        if kind == "many that are alike":
            logits_BV = logits_BV.round()
        if kind == "one that is no number":
            logits_BV[1, 17 * seed] = math.nan
        seen_BT = torch.randint(vocab, (batch, 30), generator=drawn)
        seen_BT[:, :9] = logits_BV.nan_to_num(50).topk(9).indices  # a penalty pushes the best ones down
        parts = torch.randperm(vocab, generator=drawn).sort().values.split([250, 50, 300])
        whole_BV = torch.full_like(logits_BV, -math.inf)
        sampling = Sampling(max_new_tokens=1, seed=seed, **settings)
        for i, rows_R in enumerate(parts):
            part = logits_BV[:, rows_R]
            fill_in(whole_BV, rows_R, part if i == 0 else deciding(part, sampling, seen_BT.shape[1]))
        chosen: list[Any] = []
        for given in (logits_BV, whole_BV):
            try:
                chosen.append(Chooser(sampling, seen_BT).from_logits(given).tolist())
            except Unsampled as error:
                chosen.append(str(error))
        assert chosen[0] == chosen[1]


@pytest.mark.parametrize(("settings", "few"), [({"temperature": 0.0, "repetition_penalty": 1.2}, True),
                                               ({"temperature": 0.8, "top_k": 10}, True),
                                               ({"temperature": 0.8}, False)])  # fmt: skip
def test_holders_of_a_head_send_few_rows_and_the_tokens_stay(settings, few):
    model = copy.deepcopy(family_model("llama"))
    model.resize_token_embeddings(4000)
    settings = Sampling(max_new_tokens=NEW_TOKENS, seed=3, **settings)
    found, sent = [], []
    for devices in (1, 3):
        with split(model, devices=devices, planner="even", lean=True) as engine:
            found.append(list(engine.stream(PROMPT, settings)))
            assert engine.report is not None
            sent.append(engine.report.bytes_per_token)
    assert found[0] == found[1]
    rows = 4000 * 2 / 3 * 4  # bytes of the logits that lie with others
    assert (sent[1] < rows) == few
