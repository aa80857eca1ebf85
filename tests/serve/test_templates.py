"""Chat templates behind the API: what a request may say of them, and that nobody waits for a bad one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_server import HTTP, Served, serving
from fake_engine import CHAT_TEMPLATE, FakeEngine

ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving(FakeEngine()) as served:
        yield served


@pytest.fixture(scope="module")
def trusting() -> Iterator[Served]:
    with serving(FakeEngine(), trust_request_chat_template=True) as served:
        yield served


def chat(served: Served, **change: Any) -> httpx.Response:
    return served.post("/v1/chat/completions", json={**ASK, **change})


def prompt(served: Served, **change: Any) -> str:
    """What the engine was asked for a request."""
    answer = chat(served, **change)
    assert answer.status_code == 200, answer.text
    return served.engine.tokenizer.decode(served.engine.runs[-1].prompt_ids)


@pytest.mark.parametrize(
    "change", [{"chat_template": "{{ messages }}"}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_what_a_request_says_of_the_template_is_refused_unless_it_is_trusted(shared, change) -> None:
    answer = chat(shared, **change)
    (name,) = change
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert "--trust-request-chat-template" in answer.json()["error"]["message"]
    assert prompt(shared, **dict.fromkeys(change)) == prompt(shared)
    assert prompt(shared, chat_template_kwargs={}) == prompt(shared)


def test_a_trusted_request_brings_its_template_and_variables(trusting) -> None:
    template = "{{ voice }}:{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompt(trusting, chat_template=template, chat_template_kwargs={"voice": "soft"}) == "soft:hi"
    assert prompt(trusting, chat_template_kwargs={"voice": "soft"}) == prompt(trusting)
    answer = chat(trusting, chat_template="\n{{ 1 // 0 }}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template"
    assert "the request's chat_template, line 2: ZeroDivisionError" in answer.json()["error"]["message"]
    answer = chat(trusting, chat_template_kwargs={"messages": []})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"


def test_the_ends_of_the_prompt_are_as_the_request_says(shared) -> None:
    opened = "<|im_start|>user\nhi<|im_end|>\n"
    assert prompt(shared) == prompt(shared, add_generation_prompt=True) == opened + "<|im_start|>assistant\n"
    assert prompt(shared, add_generation_prompt=False) == opened
    messages = [*ASK["messages"], {"role": "assistant", "content": "yes, but"}]
    continued = prompt(shared, messages=messages, continue_final_message=True)
    assert continued == opened + "<|im_start|>assistant\nyes, but"
    answer = chat(shared, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "continue_final_message"


def test_a_template_and_a_tokenizer_that_both_add_the_first_token_give_one() -> None:
    from tokenizers.processors import TemplateProcessing

    engine = FakeEngine()
    bos = engine.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    engine.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    engine.tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    engine.tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    with serving(engine) as served:
        prompt(served)
        assert engine.runs[-1].prompt_ids.count(bos) == 1
        prompt(served, add_special_tokens=True)
        assert engine.runs[-1].prompt_ids[:3].count(bos) == 2
        for add, first in ((None, [bos]), (True, [bos]), (False, [])):
            body = {"model": "fake", "prompt": "hi", "max_tokens": 1, "add_special_tokens": add}
            assert served.post("/v1/completions", json=body).status_code == 200
            assert engine.runs[-1].prompt_ids == [
                *first,
                *engine.tokenizer("hi", add_special_tokens=False)["input_ids"],
            ]


def test_nobody_waits_for_a_template_that_does_not_end(trusting) -> None:
    prompt(trusting)
    with ThreadPoolExecutor(1) as caller:
        bad = caller.submit(chat, trusting, chat_template=ENDLESS)
        for _ in range(5):
            assert HTTP.get(f"{trusting.url}/health").status_code == 200
            assert trusting.post("/v1/completions", json={"model": "fake", "prompt": "x"}).status_code == 200
            prompt(trusting)
        assert not bad.done(), "others were served meanwhile"
        assert bad.result().status_code == 400
        assert "line 1: it did not end" in bad.result().json()["error"]["message"]
