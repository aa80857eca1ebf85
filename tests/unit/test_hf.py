"""SplitModel behaves as a transformers model: same seed, same tokens, whatever generate is asked to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import family_model
from splits import split, threads_of
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from splitray.errors import InputError
from splitray.runtime import hf
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.hf import CacheHandle, SplitModel

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "several_returns": {"do_sample": True, "num_return_sequences": 3},
    "min_p_and_bad_words": {"do_sample": True, "min_p": 0.02, "bad_words_ids": [[7], [9, 9]]},
    "no_repeat_ngrams": {"no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def pair(request):
    torch.set_num_threads(1)
    model = family_model(request.param)
    with split(model, devices=3, seed=3) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "read_config", lambda _: model.config)
        yield model, SplitModel(engine)


@pytest.mark.parametrize("case", ["greedy", "sampling", "beams"])
def test_a_device_that_dies_in_the_middle_of_generate_changes_no_token(case):
    torch.set_num_threads(1)
    model = family_model("llama")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    with split(model, devices=3, planner="even", recovery=Recovery()) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "read_config", lambda _: model.config)
        beside = CacheHandle(engine, 20)
        logits = engine.step(Forward(session=beside.session, ids=ids[1:], position=0, keep=1, capacity=20))
        steps = []

        class Kills(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                steps.append(input_ids)
                if len(steps) in (3, 6):
                    threads_of(engine).kill("cloud0" if len(steps) == 3 else "edge0")
                return torch.zeros(len(input_ids), dtype=torch.bool)

        (whole,) = _both((model,), ids, mask, **CASES[case])
        killers = StoppingCriteriaList([Kills()])
        (parts,) = _both((SplitModel(engine),), ids, mask, stopping_criteria=killers, **CASES[case])
        assert len(engine.faults) == 2 and whole.tolist() == parts.tolist()
        token = logits[:, -1].argmax(-1, keepdim=True)
        after = engine.step(Forward(session=beside.session, ids=token, position=9, keep=1, capacity=20))
        expected = model(torch.cat([ids[1:], token], dim=1)).logits[:, -1:]
        assert torch.allclose(after, expected, atol=1e-4), "a session beside it is read again too"
        engine.forget(beside.session)
        assert {s["kv_bytes"] for s in engine.stats().values()} == {0}


def _both(pair, ids, mask, **options):
    outs = []
    for model in pair:
        torch.manual_seed(7)
        outs.append(model.generate(ids, attention_mask=mask, max_new_tokens=10, **options))
    return outs


@pytest.mark.thin(4, each="pair")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_tokens_of_transformers(pair, case, padded):
    ids = torch.randint(3, 90, (3 if padded else 1, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :2] = 0
        ids[mask == 0] = 0
    whole, parts = _both(pair, ids, mask, **CASES[case])
    assert whole.tolist() == parts.tolist()


def test_prompt_lookup_crops_the_cache_and_gives_the_same_tokens(pair):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    whole, parts = _both(pair, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3)
    assert whole.tolist() == parts.tolist()


def test_forward_gives_all_logits_of_a_padded_batch(pair):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.inference_mode():
        whole, parts = (m(ids, attention_mask=mask).logits[mask == 1] for m in pair)
    assert torch.allclose(whole, parts, atol=1e-5 * float(whole.abs().max()))


def test_streamers_processors_and_stopping_criteria_are_called(pair):
    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, 11] = -float("inf")
            return scores

    class Collect(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    ids = torch.tensor([[5, 6, 7]])
    streams = (Collect(), Collect())
    outs = [
        m.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=s, logits_processor=LogitsProcessorList([Ban()]),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(8)]), max_new_tokens=50,
        )
        for m, s in zip(pair, streams, strict=True)
    ]  # fmt: skip
    assert outs[0].tolist() == outs[1].tolist()
    assert streams[0].seen == streams[1].seen
    assert outs[1].shape[1] == 8


def test_the_devices_keep_no_kv_after_generate(pair):
    ids = torch.tensor([[5, 6, 7]])
    pair[1].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert sum(s["kv_bytes"] for s in pair[1].engine.stats().values()) == 0


def test_ids_outside_the_vocabulary_are_refused(pair):
    with pytest.raises(InputError, match="ids in"):
        pair[1](torch.tensor([[1, 5000]]))
    with pytest.raises(InputError, match="at least one token"):
        pair[1](torch.empty(1, 0, dtype=torch.long))
