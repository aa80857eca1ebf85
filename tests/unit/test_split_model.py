"""SplitModel where transformers users go beyond generate(): the same result, or a refusal that says why."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from families import family_model
from splits import SOON_S, split
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from splitray.errors import InputError
from splitray.model.lengths import LengthRule
from splitray.model.mask_positions import counts_masked
from splitray.runtime import hf
from splitray.runtime.cache_handle import CacheHandle
from splitray.runtime.hf import SplitModel

IDS = torch.tensor([[5, 17, 60, 3, 44, 44, 8, 61, 12]])
FREE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {
    "no_cache": {"use_cache": False},
    "no_cache_beams": {"use_cache": False, "num_beams": 3},
    "guidance": {"guidance_scale": 1.7},
    "guidance_without_cache": {"guidance_scale": 1.7, "use_cache": False},
    "guidance_with_a_negative_prompt": {"guidance_scale": 0.4, "negative_prompt_ids": torch.tensor([[7, 9, 7]])},
    "prompt_in_chunks": {"prefill_chunk_size": 4},
    "static_cache": {"cache_implementation": "static"},
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def pair(request):
    torch.set_num_threads(1)
    model = family_model(request.param)
    with split(model, devices=3, seed=3) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "read_config", lambda _: copy.deepcopy(model.config))
        with torch.no_grad():
            yield model, SplitModel(engine)


@pytest.fixture(autouse=True)
def no_kv_is_left(request):
    yield
    if "pair" in request.fixturenames:
        assert frees_its_kv(request.getfixturevalue("pair")[1])


def kv_bytes(model):
    return sum(s["kv_bytes"] for s in model.engine.stats().values())


def frees_its_kv(model):
    """Devices are told to free it, and nobody waits for their answer."""
    end = time.monotonic() + SOON_S
    while kv_bytes(model) and time.monotonic() < end:
        time.sleep(0.01)
    return kv_bytes(model) == 0


def close(whole, parts):
    return torch.allclose(whole, parts, atol=1e-5 * float(whole.abs().max()))


def loop(model, ids, steps, **first):
    """Greedy ids [batch, steps] and the cache, by forwards alone."""
    out, made = model(ids, use_cache=True, **first), []
    for _ in range(steps):
        made.append(out.logits[:, -1:].argmax(-1))
        out = model(made[-1], past_key_values=out.past_key_values)
    return torch.cat(made, 1), out.past_key_values


@pytest.mark.parametrize(
    ("mode", "padded"),
    [(m, p) for m in MODES for p in (False, True) if not (p and m.startswith("guidance"))],  # it is for one sequence
)
def test_a_way_to_generate_gives_the_tokens_of_transformers(pair, mode, padded):
    ids = IDS.repeat(2, 1) if padded else IDS
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = ids[0, :4] = 0
    whole, parts = (m.generate(ids, attention_mask=mask, max_new_tokens=12, **FREE, **MODES[mode]) for m in pair)
    assert whole.tolist() == parts.tolist()


def test_a_loop_by_hand_gives_the_same_ids_and_frees_its_kv_with_the_last_reference(pair):
    (whole, _), (parts, cache) = (loop(m, IDS, 8) for m in pair)
    assert whole.tolist() == parts.tolist()
    assert cache.get_seq_length() == IDS.shape[1] + 8 and kv_bytes(pair[1]) > 0
    del cache
    assert frees_its_kv(pair[1])


def test_forward_keeps_no_kv_without_a_cache(pair):
    out = pair[1](IDS, use_cache=False)
    assert out.past_key_values is None and frees_its_kv(pair[1])


@pytest.mark.parametrize("told", ["all", "new"])
def test_a_returned_cache_is_taken_up_again(pair, told):
    ends = []
    for m in pair:
        first = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, return_dict_in_generate=True, **FREE
        )
        ids = torch.cat([first.sequences, torch.tensor([[4, 9]])], 1)
        given = ids if told == "all" else ids[:, first.past_key_values.get_seq_length() :]
        again = m.generate(given, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values,
                           max_new_tokens=6, **FREE)  # fmt: skip
        ends.append(again[0, -6:].tolist())
    assert ends[0] == ends[1]


def test_a_cache_that_forward_made_is_cropped_and_generated_from(pair):
    whole, parts = pair
    cache = parts(IDS[:, :6]).past_key_values
    cache.crop(-1)
    ids = torch.cat([IDS[:, :5], torch.tensor([[50, 2]])], 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, **FREE}
    assert whole.generate(ids, **options).tolist() == parts.generate(ids, past_key_values=cache, **options).tolist()


def test_a_running_batch_is_repeated_and_selected(pair):
    ends = []
    for m in pair:
        out = m(IDS)
        out.past_key_values.batch_repeat_interleave(3)
        two = m(torch.tensor([[5], [6], [7]]), past_key_values=out.past_key_values)
        two.past_key_values.batch_select_indices(torch.tensor([2, 0]))
        ends.append(m(torch.tensor([[8], [9]]), past_key_values=two.past_key_values).logits)
    assert close(*ends)


def test_several_generations_at_once_do_not_meet_and_leave_no_kv(pair):
    whole, parts = pair
    prompts = [IDS + n for n in range(4)]
    found: dict[int, list[int]] = {}

    def one(n):
        mode = [{}, {"num_beams": 2}, {"use_cache": False}, {"guidance_scale": 1.5}][n]
        mask = torch.ones_like(IDS)
        found[n] = parts.generate(prompts[n], attention_mask=mask, max_new_tokens=8, **FREE, **mode).tolist()
        mode_of[n] = mode

    mode_of: dict[int, dict[str, Any]] = {}
    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert frees_its_kv(parts)
    for n, ids in enumerate(prompts):
        expected = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **FREE, **mode_of[n])
        assert found[n] == expected.tolist()


@pytest.mark.parametrize("role", ["assisted", "assistant", "both"])
def test_it_is_assisted_and_assists(pair, role):
    """Each asks the other's cache to take tokens back."""
    whole, parts = pair
    models = {"assisted": (parts, whole), "assistant": (whole, parts), "both": (parts, parts)}[role]
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 10, **FREE}
    found = models[0].generate(IDS, assistant_model=models[1], **options)
    assert found.tolist() == whole.generate(IDS, **options).tolist()


def test_a_generation_that_fails_leaves_no_kv(pair):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError) as error:
        pair[1].generate(IDS, attention_mask=torch.ones_like(IDS), logits_processor=LogitsProcessorList([Fails()]))
    assert frees_its_kv(pair[1]), f"although {error} is held"


def test_labels_give_the_loss_and_a_tuple_is_given_where_it_is_asked_for(pair):
    labels = IDS.clone()
    labels[:, :3] = -100
    whole, parts = (m(IDS, labels=labels, num_items_in_batch=4) for m in pair)
    assert close(whole.loss, parts.loss)
    loss, logits = pair[1](IDS, labels=labels, use_cache=False, return_dict=False)
    assert close(pair[0](IDS, labels=labels).loss, loss) and logits.shape == parts.logits.shape


KEPT = [0, 1, 4, 99, -2, torch.tensor([1, 5]), torch.tensor([-1]), torch.tensor([[0, 8, 3]]), IDS == 44]


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_logits_of_the_kept_positions_are_those_of_transformers(pair, kept):
    whole, parts = (m(IDS, logits_to_keep=kept).logits for m in pair)
    assert whole.shape == parts.shape and close(whole, parts)


def test_it_counts_the_parameters_of_the_whole_model(pair):
    for options in ({}, {"exclude_embeddings": True}):
        assert pair[0].num_parameters(**options) == pair[1].num_parameters(**options)
    assert pair[1].num_parameters(only_trainable=True) == 0


def test_positions_beyond_a_learned_table_are_refused_and_the_engine_goes_on(monkeypatch):
    model = family_model("gpt2")
    monkeypatch.setattr(hf, "read_config", lambda _: copy.deepcopy(model.config))
    with split(model) as engine, torch.no_grad():
        parts, context = SplitModel(engine), engine.arch.context_tokens
        for last in (context, -9):
            with pytest.raises(InputError, match="position_ids: expected positions in"):
                parts(IDS, position_ids=torch.arange(last - 8, last + 1)[None])
        full = torch.full((1, context), 5)
        with pytest.raises(InputError, match="fewer new tokens"):
            parts.generate(full, attention_mask=torch.ones_like(full), max_new_tokens=3, **FREE)
        assert close(model(full).logits, parts(full).logits)
        assert close(model(IDS, token_type_ids=None).logits, parts(IDS, token_type_ids=None).logits)
        with pytest.raises(InputError, match="token_type_ids"):  # this family looks at them
            parts(IDS, token_type_ids=torch.zeros_like(IDS))


def test_positions_beyond_the_context_are_computed_where_the_family_computes_them(pair):
    long = torch.arange(200)[None] % 90
    assert close(*(m(long, logits_to_keep=1).logits for m in pair))


def test_a_family_that_counts_what_is_not_masked_is_followed_where_no_positions_are_given(monkeypatch):
    model = family_model("opt")
    monkeypatch.setattr(hf, "read_config", lambda _: copy.deepcopy(model.config))
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with split(model) as engine, torch.no_grad():
        ends = []
        for m in (model, SplitModel(engine)):
            first = m(ids, attention_mask=mask[:, :9])
            second = m(ids[:, :2], attention_mask=mask, past_key_values=first.past_key_values)
            ends.append(torch.cat([first.logits, second.logits], 1)[mask == 1])
        assert close(*ends)
    assert counts_masked(family_model("gpt2").config) and not counts_masked(model.config)


CAUSAL = torch.ones(1, 1, IDS.shape[1], IDS.shape[1]).tril()
REFUSED: dict[str, dict[str, Any]] = {
    "output_hidden_states": {"output_hidden_states": True},
    "output_attentions": {"output_attentions": True},
    "output_router_logits": {"output_router_logits": True},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 9, 8)},
    "is_causal": {"is_causal": False},
    "some_new_thing": {"some_new_thing": 1},
    "attention_mask": {"attention_mask": CAUSAL},
    "attention_mask: expected .*9 positions": {"attention_mask": torch.ones(1, 4)},
    "attention_mask: .*dict": {"attention_mask": {"full_attention": CAUSAL}},
    "position_ids": {"position_ids": torch.arange(4)[None]},
    "position_ids: .*one after another": {"position_ids": torch.arange(9)[None] % 3, "use_cache": False},
    "past_key_values: .*DynamicCache": {"past_key_values": DynamicCache()},
    "past_key_values: .*tuple": {"past_key_values": ()},
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_devices_do_not_get_to_know_is_refused(pair, what):
    with pytest.raises(InputError, match=what):
        pair[1](IDS, **REFUSED[what])


def test_what_means_nothing_to_the_family_is_ignored_as_transformers_ignores_it(pair):
    ignored = {"token_type_ids": torch.zeros_like(IDS), "output_attentions": False, "is_causal": True, "tokenizer": 1}
    assert close(*(m(IDS, **ignored).logits for m in pair))


@pytest.mark.parametrize(
    "option",
    [
        {"assistant_early_exit": 1}, {"cache_implementation": "quantized"}, {"cache_implementation": "paged"},
        {"inputs_embeds": torch.zeros(1, 9, 8)}, {"past_key_values": DynamicCache()}, {"output_hidden_states": True},
        {"use_mtp": True},
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_generate_that_look_into_the_model_are_refused(pair, option):
    options = {"return_dict_in_generate": True, "max_new_tokens": 4, **option}
    with pytest.raises(InputError, match="generate_batch" if "paged" in option.values() else next(iter(option))):
        pair[1].generate(IDS, attention_mask=torch.ones_like(IDS), **options)


def test_guidance_is_refused_where_two_sequences_would_share_a_growing_table(pair, monkeypatch):
    monkeypatch.setattr(hf, "length_rule", lambda _: LengthRule(grows_from=20))
    with pytest.raises(InputError, match="guidance_scale"):
        pair[1].generate(IDS, max_new_tokens=2, guidance_scale=1.5)


CALLS: dict[str, Any] = {
    "save_pretrained": lambda m: m.save_pretrained("nowhere"),
    "state_dict": lambda m: m.state_dict(),
    "get_input_embeddings": lambda m: m.get_input_embeddings(),
    "resize_token_embeddings": lambda m: m.resize_token_embeddings(7),
    "get_memory_footprint": lambda m: m.get_memory_footprint(),
    "add_adapter": lambda m: m.add_adapter({}),
    r"an adapter \(PEFT\)": lambda m: hasattr(m, "peft_config"),  # as get_peft_model asks
    "load_adapter": lambda m: m.load_adapter("there"),
    "get_submodule": lambda m: m.get_submodule("model.embed_tokens"),
    "copying": copy.deepcopy,
    "moving": lambda m: m.half(),
}


@pytest.mark.parametrize("what", CALLS)
def test_what_needs_the_weights_here_is_refused(pair, what):
    with pytest.raises(InputError, match=what):
        CALLS[what](pair[1])
    assert pair[1].to("cpu").eval().device.type == "cpu"


def test_a_wrapper_that_prepares_the_inputs_itself_is_refused(pair, monkeypatch):
    monkeypatch.setattr(pair[1], "prepare_inputs_for_generation", pair[0].prepare_inputs_for_generation)
    with pytest.raises(InputError, match="prepare_inputs_for_generation: .*ForCausalLM"):
        pair[1].generate(IDS, max_new_tokens=2)
    monkeypatch.undo()
    pair[1].prepare_inputs_for_generation = pair[1].prepare_inputs_for_generation  # as PEFT leaves it
    pair[1].generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)


def test_a_cache_that_is_freed_or_of_another_batch_or_copied_is_refused(pair):
    cache = pair[1](IDS).past_key_values
    assert isinstance(cache, CacheHandle)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="copy"):
            copied(cache)
    with pytest.raises(InputError, match="1 sequences"):
        pair[1](IDS.repeat(2, 1), past_key_values=cache)
    with pytest.raises(InputError, match="give -2"):
        cache.crop(cache.length - 2)
    cache.close()
    with pytest.raises(InputError, match="freed"):
        pair[1](IDS, past_key_values=cache)


def test_a_cache_that_is_reset_takes_another_batch(pair):
    cache = pair[1](IDS).past_key_values
    cache.reset()
    two = IDS.repeat(2, 1) + torch.tensor([[0], [1]])
    assert close(pair[0](two).logits, pair[1](two, past_key_values=cache).logits)


def test_a_config_that_asks_for_hidden_states_is_told_that_there_are_none(pair, monkeypatch):
    config = copy.deepcopy(pair[0].config)
    config.output_hidden_states = True
    monkeypatch.setattr(hf, "read_config", lambda _: config)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        model = SplitModel(pair[1].engine)
    assert model(IDS, use_cache=False).hidden_states is None
    model.config.output_hidden_states = True
    with pytest.raises(InputError, match="output_hidden_states"):
        model(IDS)
