from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import HTTP, Served, serving, wait_for
from fake_engine import CONTEXT_TOKENS, FakeEngine
from tokenizers_made import byte_level, sentencepiece

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 30}


def test_a_completion_has_the_shape_the_client_parses(served: Served) -> None:
    answer = served.client.completions.create(model="fake", prompt="the cat", max_tokens=30)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "fake", "cmpl-")
    assert [c.model_dump() for c in answer.choices] == [
        {"finish_reason": "stop", "index": 0, "logprobs": None, "text": "THE CAT"}
    ]
    run = served.engine.runs[0]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(run.prompt_ids)
    assert answer.usage.completion_tokens == run.num_out
    assert answer.usage.total_tokens == len(run.prompt_ids) + run.num_out


def test_a_chat_answer_has_the_shape_the_client_parses(served: Served) -> None:
    served.engine.reply = lambda prompt: "Hello 🎉"
    answer = served.client.chat.completions.create(**CHAT)
    assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == (
        "assistant",
        "Hello 🎉",
        None,
    )


def test_the_dialogue_goes_through_the_models_chat_template(served: Served) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "four", "name": "ann"},
    ]
    served.client.chat.completions.create(model="fake", messages=messages)
    assert served.engine.tokenizer.decode(served.engine.runs[0].prompt_ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none two<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_streamed_chat_has_role_text_end_usage_and_done_under_one_id(served: Served) -> None:
    served.engine.reply = lambda prompt: "né 🎉"
    *events, done = served.events(
        "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert done == "[DONE]"
    chunks = [json.loads(e) for e in events]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", chunks[0]["created"], "fake")
    }
    *choices, usage = chunks
    deltas = [c["choices"][0]["delta"] for c in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(d["content"] for d in deltas[:-1]) == "né 🎉"
    assert not any("\ufffd" in d.get("content", "") for d in deltas), "no incomplete character"
    assert all(set(d) == {"content"} and d["content"] for d in deltas[1:-1])
    assert [c["choices"][0]["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all(c["usage"] is None for c in choices)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == served.engine.runs[0].num_out


def test_without_include_usage_no_chunk_speaks_of_usage(served: Served) -> None:
    *chunks, done = served.events("/v1/completions", {**COMPLETION, "stream": True})
    assert done == "[DONE]"
    assert all("usage" not in json.loads(c) and json.loads(c)["choices"] for c in chunks)


def test_the_openai_client_streams_text_as_it_comes(served: Served) -> None:
    served.engine.reply, served.engine.delay_s = lambda prompt: "the cat sat on the mat", 0.02
    seen = []
    for chunk in served.client.completions.create(**COMPLETION, stream=True):
        seen.append((chunk.choices[0].text, served.engine.runs[0].num_out))
    texts = [t for t, _ in seen]
    assert "".join(texts) == "the cat sat on the mat"
    assert len([t for t in texts if t]) > 3
    assert seen[0][1] < served.engine.runs[0].num_out, "the first text came before the last token"


def test_streamed_and_whole_answers_say_the_same(served: Served) -> None:
    served.engine.reply = lambda prompt: "日本 the cat\n\nsat"
    whole = served.client.chat.completions.create(**CHAT).choices[0].message.content
    stream = served.client.chat.completions.create(**CHAT, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole == "日本 the cat\n\nsat"


@pytest.mark.parametrize("prompt", ["the cat", ["the cat"], "IDS", ["IDS"]], ids=str)
def test_the_four_shapes_of_a_prompt_mean_the_same(served: Served, prompt: Any) -> None:
    ids = served.engine.tokenizer("the cat")["input_ids"]
    prompt = {"IDS": ids, "['IDS']": [ids]}.get(str(prompt), prompt)
    answer = served.client.completions.create(model="fake", prompt=prompt, max_tokens=30)
    assert [c.text for c in answer.choices] == ["THE CAT"]
    assert served.engine.runs[0].prompt_ids == ids


def test_several_prompts_are_several_choices_streamed_too(served: Served) -> None:
    prompts = ["one", "two", "three"]
    answer = served.client.completions.create(model="fake", prompt=prompts, max_tokens=30)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "ONE"), (1, "TWO"), (2, "THREE")]
    assert answer.usage is not None and answer.usage.completion_tokens == sum(r.num_out for r in served.engine.runs)
    texts = ["", "", ""]
    for chunk in served.client.completions.create(model="fake", prompt=prompts, max_tokens=30, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ONE", "TWO", "THREE"]


def test_a_stop_string_across_tokens_is_cut_and_never_shown(served: Served) -> None:
    served.engine.reply, served.engine.delay_s = lambda prompt: "the cat sat on the mat" * 5, 0.01
    body = {**COMPLETION, "stop": ["at on", "zzz"]}
    answer = served.client.completions.create(**body)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the cat s", "stop")
    chunks = list(served.client.completions.create(**body, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "the cat s"
    assert chunks[-1].choices[0].finish_reason == "stop"
    wait_for(lambda: all(r.closed_early for r in served.engine.runs))
    assert max(r.num_out for r in served.engine.runs) < 30, "the engine does not go on for nothing"


def test_what_only_looks_like_a_stop_string_comes_in_the_end(served: Served) -> None:
    served.engine.reply = lambda prompt: "the cat sa"
    answer = served.client.completions.create(**COMPLETION, stop="sat")
    assert answer.choices[0].text == "the cat sa"


def test_a_stop_string_that_is_a_special_token_stops_at_its_id(served: Served) -> None:
    served.engine.reply = lambda prompt: "yes<|im_end|>no"
    assert served.client.completions.create(**COMPLETION, stop="<|im_end|>").choices[0].text == "yes"


def test_a_completion_goes_on_from_its_prompt_and_a_chat_answer_is_a_text_of_its_own() -> None:
    tokenizer = sentencepiece(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = tokenizer("the cat sat")["input_ids"]
    with serving(FakeEngine(tokenizer=tokenizer, say=lambda prompt_ids: ids, ends=False)) as served:
        create = served.client.completions.create
        assert create(model="fake", prompt="the mat").choices[0].text == " the cat sat"
        assert create(model="fake", prompt=tokenizer("the mat")["input_ids"]).choices[0].text == " the cat sat"
        assert "".join(c.choices[0].text for c in create(model="fake", prompt="the mat", stream=True)) == " the cat sat"
        assert served.client.chat.completions.create(**CHAT).choices[0].message.content == "the cat sat"
        begun: Any = [*CHAT["messages"], {"role": "assistant", "content": "the mat"}]
        body = {"continue_final_message": True, "add_generation_prompt": False}
        answer = served.client.chat.completions.create(model="fake", messages=begun, extra_body=body)
        assert answer.choices[0].message.content == " the cat sat"


@pytest.mark.parametrize("stop", ["<|eot|>", "at<|eot|>", "<tool>"])
def test_special_and_added_tokens_are_left_out_kept_and_stop(stop: str) -> None:
    tokenizer = byte_level()
    engine = FakeEngine(tokenizer=tokenizer, reply=lambda prompt: "the cat<|eot|><tool> sat</s>", ends=False)
    text = {"<|eot|>": "the cat", "at<|eot|>": "the c", "<tool>": "the cat"}[stop]
    with serving(engine) as served:

        def ask(**body: object) -> tuple[str, str | None]:
            (choice,) = served.client.completions.create(**COMPLETION, extra_body=body).choices
            return choice.text, choice.finish_reason

        assert ask() == ("the cat<tool> sat", "stop")
        assert ask(skip_special_tokens=True, spaces_between_special_tokens=True) == ("the cat<tool> sat", "stop")
        assert ask(skip_special_tokens=False) == ("the cat<|eot|><tool> sat", "stop")
        assert ask(skip_special_tokens=False, include_stop_str_in_output=True)[0] == "the cat<|eot|><tool> sat</s>"
        assert ask(stop=stop) == (text, "stop")
        with_stop = ask(stop=stop, skip_special_tokens=False, include_stop_str_in_output=True)
        assert with_stop == ("the cat<|eot|><tool>"[: 20 if stop == "<tool>" else 14], "stop")


@pytest.mark.parametrize("configured", ["<|im_end|>", ["<|endoftext|>", "<|im_end|>"]], ids=str)
def test_the_checkpoint_may_name_other_ends_than_the_tokenizer(tmp_path: Path, configured: object) -> None:
    engine = FakeEngine(reply=lambda prompt: "yes<|im_end|>no", model_path=str(tmp_path))
    ids = engine.tokenizer.convert_tokens_to_ids(configured)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with serving(engine) as served:
        answer = served.client.chat.completions.create(**CHAT)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("yes", "stop")


def test_the_limit_ends_with_length_and_the_end_of_sequence_with_stop(served: Served) -> None:
    served.engine.ends = False
    answer = served.client.completions.create(model="fake", prompt="the cat", max_tokens=4)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 4)
    chunks = list(served.client.completions.create(model="fake", prompt="the cat", max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_answer_may_be_empty(served: Served) -> None:
    served.engine.reply = lambda prompt: ""
    answer = served.client.chat.completions.create(**CHAT)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    chunks = list(served.client.chat.completions.create(**CHAT, stream=True))
    assert [c.choices[0].delta.role for c in chunks] == ["assistant", None]


def test_what_the_client_names_reaches_the_engine_and_null_means_default(served: Served) -> None:
    post = served.client.post
    post("/completions", body={**COMPLETION, "temperature": 0.5, "top_p": 0.9, "seed": -1}, cast_to=object)
    nulls = dict.fromkeys(
        [
            "max_tokens",
            "temperature",
            "top_p",
            "seed",
            "stop",
            "stream",
            "stream_options",
            "n",
            "best_of",
            "echo",
            "logprobs",
            "suffix",
            "user",
            "logit_bias",
            "presence_penalty",
            "frequency_penalty",
        ]
    )
    post("/completions", body={"model": "fake", "prompt": "hi", **nulls}, cast_to=object)
    chat_nulls = dict.fromkeys(
        ["max_completion_tokens", "tools", "tool_choice", "response_format", "top_logprobs", "metadata"]
    )
    post("/chat/completions", body={**CHAT, **chat_nulls, "max_tokens": 3}, cast_to=object)
    post("/chat/completions", body={**CHAT, "max_completion_tokens": 5, "max_tokens": 3}, cast_to=object)
    post("/chat/completions", body={**CHAT, "temperature": 1, "top_p": 0}, cast_to=object)
    named, default, chat, newer, no_mass = (r.sampling for r in served.engine.runs)
    eos = served.engine.tokenizer.eos_token_id
    assert (named.max_new_tokens, named.temperature, named.top_p, named.seed) == (30, 0.5, 0.9, 2**63 - 1)
    assert named.stop_ids == (eos,)
    assert (default.max_new_tokens, default.temperature, default.top_p) == (16, 0.0, 1.0)
    assert (chat.max_new_tokens, newer.max_new_tokens) == (3, 5)
    assert no_mass.max_new_tokens == CONTEXT_TOKENS - len(served.engine.runs[-1].prompt_ids)
    assert no_mass.temperature == 0.0, "the smallest nucleus is the likeliest token"


def test_requests_without_a_seed_differ_from_each_other(served: Served) -> None:
    for _ in range(3):
        served.client.completions.create(**COMPLETION, temperature=1)
    assert len({r.sampling.seed for r in served.engine.runs}) == 3


NEUTRAL = {
    "user": "ann",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "logprobs": False,
    "tools": [],
    "tool_choice": "none",
    "top_k": -1,
    "repetition_penalty": 1.0,
}


def test_parameters_that_ask_for_nothing_are_accepted(served: Served) -> None:
    answer = served.client.chat.completions.create(**CHAT, extra_body=NEUTRAL)
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed_and_found(served: Served) -> None:
    assert [m.id for m in served.client.models.list()] == ["fake"]
    assert served.client.models.retrieve("fake").id == "fake"


def test_health_is_ok(served: Served) -> None:
    answer = HTTP.get(f"{served.url}/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
