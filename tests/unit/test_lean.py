"""The lean loop: what it runs gives the unsplit tokens, and what it would not compute exactly it does not run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import family_config, family_model
from splits import greedy, split
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from splitray.model.lean import attention, loop
from splitray.model.lean.attention import Attention
from splitray.model.lean.experts import Experts
from splitray.model.lean.ffn import GatedFfn
from splitray.model.lean.norms import norm_form, settling
from splitray.model.lean.not_lean import NotLean
from splitray.profiling.family_configs import random_model, small_config
from splitray.runtime import selftest
from splitray.runtime.sampling import Sampling
from splitray.runtime.selftest import self_test

POSITIONS = ("gpt2", "opt", "gpt_neox", "cohere2", "phi", "stablelm-parallel")
ATTENTION = ("mistral", "phi3", "glm", "smollm3", "starcoder2", "stablelm", "granite")
POST_NORM = ("gemma2", "gemma3_text", "glm4", "exaone4", "olmo2", "olmo3")
EXPERTS = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "gpt_oss",
    "glm4_moe",
    "ernie4_5_moe",
    "phimoe",
    "olmoe",
    "hunyuan_v1_moe",
)
OWN_ATTENTION = ("deepseek_v3", "glm4_moe_lite", "falcon", "gptj", "ministral3")
PROMPTS = tuple(torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 100))
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def same_tokens(model: PreTrainedModel, seed: int) -> None:
    """Over three devices with uneven shares, from a prompt within the windows and from one past them."""
    assert self_test(model.config)
    with split(model, devices=3, seed=seed) as engine:
        for prompt in PROMPTS:
            found = list(engine.stream(prompt, Sampling(max_new_tokens=NEW_TOKENS)))
            assert found == greedy(model, prompt, NEW_TOKENS), engine.placement
        assert all(s["lean"] for s in engine.stats().values() if s["weight_bytes"])


@pytest.mark.thin(4)
@pytest.mark.parametrize("family", [*POSITIONS, *ATTENTION, *POST_NORM])
def test_windows_partial_ropes_packed_weights_and_sums_that_are_normalised_run_lean(family):
    same_tokens(family_model(family), seed=len(family))


@pytest.mark.thin(5)
@pytest.mark.parametrize("family", [*EXPERTS, *OWN_ATTENTION])
def test_experts_and_attention_of_other_forms_run_lean(family):
    for seed in (1, 2):
        same_tokens(random_model(small_config(family), seed=seed), seed=seed)


def wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "window_of", lambda *_: 1 << 62)


def no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_softening", lambda _: attention._softmax)


def wrong_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GatedFfn.partial
    monkeypatch.setattr(GatedFfn, "partial", lambda *given: right(*given) * np.float32(1.01))


def wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Experts._forward
    monkeypatch.setattr(Experts, "_forward", lambda self, x, chosen, weights: right(self, x, chosen, weights * 1.01))


def wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "settling", lambda form, scale: settling(form, scale * 1.01))


@pytest.mark.parametrize(
    ("family", "wrong"),
    [("llama", wrong_ffn), ("mistral", wrong_window), ("gemma3_text", wrong_window), ("gemma2", no_sinks),
     ("gemma2", wrong_sums), ("gpt_oss", no_sinks), ("gpt_oss", wrong_window), ("mixtral", wrong_experts)],
)  # fmt: skip
def test_the_self_test_turns_the_lean_loop_off_where_it_differs(monkeypatch, family, wrong):
    config = small_config(family) if family == "gpt_oss" else family_config(family)
    monkeypatch.setattr(selftest, "_passed", {})
    wrong(monkeypatch)
    assert not self_test(config)


@pytest.mark.parametrize("family", ["gpt_neo", "afmoe", "nanochat"])
def test_what_the_loop_does_not_know_runs_transformers_code(family):
    assert not self_test(small_config(family))


def test_the_self_test_meets_devices_none_some_or_all_of_whose_experts_are_chosen(monkeypatch):
    met = dict.fromkeys(("all", "some", "none"), 0)
    right = Experts._forward

    def watched(self: Experts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            here = int((chosen < len(self.weights_EDF)).sum())
            met["none" if not here else "all" if here == chosen.numel() else "some"] += 1
        return right(self, x, chosen, weights)

    monkeypatch.setattr(Experts, "_forward", watched)
    for family in ("mixtral", "gpt_oss", "glm4_moe"):
        met.update(dict.fromkeys(met, 0))
        monkeypatch.setattr(selftest, "_passed", {})
        assert self_test(small_config(family))
        assert all(met.values()), met


def test_a_module_that_does_not_let_itself_be_tried_runs_transformers_code(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("another shape")

    monkeypatch.setattr(selftest, "_passed", {})
    monkeypatch.setattr(loop, "Ends", fails)
    assert not self_test(family_config("llama"))


def test_a_loop_that_fails_in_a_step_costs_the_loop_and_not_the_family(monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("another shape")

    monkeypatch.setattr(selftest, "_passed", {})
    monkeypatch.setattr(GatedFfn, "partial", fails)
    assert not self_test(family_config("llama"))


def test_norms_are_told_apart_by_what_they_do():
    torch.manual_seed(0)

    class Odd(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).tanh()

    norms = {
        "RMS": nn.RMSNorm(8, eps=1e-5),
        "layer": nn.LayerNorm(8),
        "bare": nn.LayerNorm(8, elementwise_affine=False),
    }
    for norm in norms.values():
        for parameter in norm.parameters():
            parameter.data.normal_()
        for scale in (1e-3, 1.0, 30.0):
            x = torch.randn(8) * scale
            y = norm_form(norm.requires_grad_(False), 8).of(x.numpy())
            assert np.allclose(y, norm(x).numpy(), atol=1e-5)
    with pytest.raises(NotLean, match="Odd is another norm"):
        norm_form(Odd(8).requires_grad_(False), 8)


def test_layers_without_positions_are_found_by_trying():
    config: PretrainedConfig = family_config("cohere2")
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = type(family_model("cohere2"))(config).eval()
    turned = []
    read = Attention.__init__

    def watched(self: Attention, *given: object) -> None:
        read(self, *given)  # type: ignore[arg-type]
        turned.append(self.rope.pairs[0] != slice(0, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "__init__", watched)
        with split(model, devices=1):
            pass
    assert turned[-3:] == [True, False, True]
