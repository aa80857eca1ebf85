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
from splitray.runtime.sampling import Chooser, Sampling

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
