"""What depends on the length is decided as transformers does: in chunks, across borders, after moves and faults."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import GQA
from splits import greedy, moved_while_generating, slow_devices, split, threads_of
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from splitray.errors import DeviceLost, ModelError
from splitray.model import lengths
from splitray.model.lengths import LengthRule
from splitray.runtime import hf
from splitray.runtime.device import decode
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.hf import SplitModel
from splitray.runtime.sampling import Sampling

BORDER = 16
LONGROPE: dict[str, object] = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.5, 4.0, 6.0], "factor": 8.0,
    "original_max_position_embeddings": BORDER, "rope_theta": 10000.0,
}  # fmt: skip
DYNAMIC: dict[str, object] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
PLAIN: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
OWN = {"original_max_position_embeddings": BORDER}
PLAINLY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, dict[str, object]] = {
    "llama": {"rope_parameters": LONGROPE},
    "qwen3": {"rope_parameters": DYNAMIC, "max_position_embeddings": BORDER, "head_dim": 8},
    "gemma3_text": {
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
        "max_position_embeddings": BORDER, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"rope_parameters": LONGROPE, **OWN},
}  # fmt: skip


def _model(family: str) -> PreTrainedModel:
    values: dict[str, Any] = {**GQA, "vocab_size": 97, **MODELS[family]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 9.0 if "self_attn" in name else 3.0)
    return model.eval()


def _prompt(tokens: int) -> list[int]:
    return torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def _fresh(family: str, prompt: list[int], new_tokens: int) -> list[int]:
    """By a model that has run nothing before: transformers' own keep a table that has grown."""
    return greedy(_model(family), prompt, new_tokens)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(decode, "CHUNK_TOKENS", 6)


@pytest.mark.parametrize("family", MODELS)
def test_prompts_and_generations_across_a_border_give_the_unsplit_tokens(family, monkeypatch):
    monkeypatch.setattr("splitray.runtime.engine.engine.check_prompt", lambda *_: None)  # dynamic: past its context
    with split(_model(family), devices=3, seed=2, lean=False) as engine:
        for tokens in (BORDER + 9, 5, BORDER - 4, BORDER, BORDER + 1):
            prompt = _prompt(tokens)
            found = list(engine.stream(prompt, Sampling(max_new_tokens=10)))
            assert found == _fresh(family, prompt, 10), f"a prompt of {tokens}"


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_padded_batch_across_a_border_equals_transformers(family):
    ids = torch.tensor([[0] * 5 + _prompt(9), _prompt(14)])
    mask = (torch.arange(14) >= torch.tensor([[5], [0]])).long()
    expected = _model(family).generate(ids, attention_mask=mask, max_new_tokens=9, **PLAINLY)[:, 14:]
    with split(_model(family), devices=2, seed=3, lean=False) as engine:
        steps = list(engine.stream_batch(ids.tolist(), Sampling(max_new_tokens=9), attention_mask=mask.tolist()))
    assert torch.tensor(steps).T.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_placements_that_take_over_near_a_border_change_no_token(family, monkeypatch):
    slow_devices(monkeypatch, 0.01)
    prompt, expected = _prompt(BORDER - 8), _fresh(family, _prompt(BORDER - 8), 24)
    with split(_model(family), devices=3, seed=1, lean=False) as engine:
        tokens, _ = moved_while_generating(engine, prompt, Sampling(max_new_tokens=24), range(20, 26))
    assert tokens == expected


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("kept", [False, True], ids=["no_store", "store"])
def test_faults_before_and_after_a_border_change_no_token(family, kept, monkeypatch, tmp_path):
    slow_devices(monkeypatch, 0.01)
    prompt, expected = _prompt(BORDER - 5), _fresh(family, _prompt(BORDER - 5), 20)
    recovery = Recovery(store=str(tmp_path) if kept else None, every_tokens=3 if kept else None)
    with split(_model(family), devices=2, planner="even", lean=False, recovery=recovery) as engine:
        tokens = []
        for n, token in enumerate(engine.stream(prompt, Sampling(max_new_tokens=20))):
            tokens.append(token)
            if n in (3, 6, 12):
                threads_of(engine).kill("cloud0")
    assert tokens == expected


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", MODELS)
def test_split_model_across_a_border_equals_transformers(family, options, monkeypatch):
    ids = torch.tensor([_prompt(BORDER - 4)])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, **PLAINLY}
    expected = _model(family).generate(ids, **settings, **options)
    model = _model(family)
    with split(model, devices=2, planner="even", lean=False) as engine:
        monkeypatch.setattr(hf, "read_config", lambda _: model.config)
        assert SplitModel(engine).generate(ids, **settings, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(("family", "tokens", "exact"), [("llama", 2, True), ("llama", 10, False), ("phi3", 10, True)])
def test_a_fault_in_the_middle_of_split_models_generate_gives_no_wrong_token(family, tokens, exact, monkeypatch):
    class Kills(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            if input_ids.shape[1] == BORDER - 4 + tokens - 1:
                threads_of(engine).kill("cloud0")
            return torch.zeros(1, dtype=torch.bool)

    ids = torch.tensor([_prompt(BORDER - 4)])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, **PLAINLY}
    expected, model = _model(family).generate(ids, **settings), _model(family)
    monkeypatch.setattr(hf, "read_config", lambda _: model.config)
    with split(model, devices=2, planner="even", lean=False, recovery=Recovery()) as engine:
        killed = partial(SplitModel(engine).generate, ids, stopping_criteria=StoppingCriteriaList([Kills()]))
        if exact:
            assert killed(**settings).tolist() == expected.tolist()
            assert len(engine.faults) == 1
        else:
            with pytest.raises(DeviceLost, match="the rope of this model changes with the length"):
                killed(**settings)


def test_what_is_read_again_after_a_fault_is_cut_where_transformers_decides_anew():
    def spans(rule: LengthRule, start: int, prompt: int, total: int) -> list[tuple[int, int, int | None]]:
        return list(rule.spans(start, prompt, total, lambda tokens: tokens))

    assert spans(LengthRule(), 2, 5, 9) == [(2, 9, None)]
    longrope = LengthRule(borders=(6,))
    assert spans(longrope, 0, 8, 8) == [(0, 8, 8)]
    assert spans(longrope, 0, 4, 9) == [(0, 4, 4), (4, 6, 6), (6, 9, 9)]
    assert spans(longrope, 5, 4, 9) == [(5, 6, 6), (6, 9, 9)]
    assert spans(LengthRule(grows_from=6), 3, 4, 8) == [(3, 4, 4), (4, 6, 6), (6, 7, 7), (7, 8, 8)]
    anew = LengthRule(borders=(6,), reads_anew=6)
    assert spans(anew, 5, 4, 9) == [(0, 7, 7), (7, 9, 9)]
    assert spans(anew, 7, 4, 9) == [(7, 9, 9)]
    assert spans(anew, 3, 4, 6) == [(3, 4, 4), (4, 6, 6)]
    assert spans(anew, 0, 8, 9) == [(0, 8, 8), (8, 9, 9)]


def test_a_family_with_a_loop_of_its_own_is_refused_by_the_method():
    model = _model("llama")
    own = type("OwnLoop", (type(model),), {"prepare_inputs_for_generation": lambda self: {}})
    lengths.check_generation(type(model), model.config)
    with pytest.raises(ModelError, match=r"OwnLoop.prepare_inputs_for_generation"):
        lengths.check_generation(own, model.config)
