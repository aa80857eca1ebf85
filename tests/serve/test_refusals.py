from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_server import HTTP, Served, serving
from fake_engine import CONTEXT_TOKENS, FakeEngine

from serve_apps.engine_queue import EngineQueue
from serve_apps.service import TextService
from splitray.errors import DeviceLost, InputError, Unsampled

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "hi"}


@pytest.fixture(scope="module")
def refusing() -> Iterator[Served]:
    """One server for the whole table: nothing here reaches the engine."""
    with serving(FakeEngine()) as served:
        yield served
        assert served.engine.runs == []


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [""]}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": ["one", ""]}, "prompt", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": 7}, "prompt", None),
        ({"prompt": [True]}, "prompt", None),
        ({"prompt": [1.5]}, "prompt", None),
        ({"prompt": ["one", 2]}, "prompt", None),
        ({"prompt": [300]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": "a\ud800b"}, "prompt", None),
        ({"prompt": "x" * CONTEXT_TOKENS}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * CONTEXT_TOKENS}, "prompt", "context_length_exceeded"),
        ({"prompt": ["hi", [1] * CONTEXT_TOKENS]}, "prompt", "context_length_exceeded"),
        ({"max_tokens": CONTEXT_TOKENS}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": "16"}, "max_tokens", None),
        ({"temperature": 2.1}, "temperature", None),
        ({"temperature": -0.1}, "temperature", None),
        ({"temperature": float("nan")}, "temperature", None),
        ({"temperature": float("inf")}, "temperature", None),
        ({"temperature": 1e-40}, "temperature", None),
        ({"top_p": float("nan")}, "top_p", None),
        ({"top_p": 1.1}, "top_p", None),
        ({"seed": 1.5}, "seed", None),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop", None),
        ({"stop": ""}, "stop", None),
        ({"stop": [1]}, "stop", None),
        ({"stream": "yes"}, "stream", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"model": None}, "model", None),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logprobs": 5}, "logprobs", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"frequency_penalty": 1}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter"),
        ({"made_up": 0}, "made_up", "unsupported_parameter"),
    ],
    ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else "",
)
def test_a_bad_completion_request_is_a_400_that_names_the_parameter(
    refusing: Served, change: dict[str, object], param: str, code: str | None
) -> None:
    body = json.dumps({**COMPLETION, **change})
    for stream in ("false", "true") if "stream" not in change and "stream_options" not in change else ("",):
        sent = body[:-1] + (f', "stream": {stream}}}' if stream else "}")
        answer = refusing.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
        error = error_of(answer, 400)
        assert (error["param"], error["code"]) == (param, code)
        assert param in error["message"] or code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "messages",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": CONTEXT_TOKENS}, "messages"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
    ],
    ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "",
)
def test_a_bad_chat_request_is_a_400_that_names_the_parameter(
    refusing: Served, change: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        refusing.client.post("/chat/completions", body={**CHAT, **change}, cast_to=object)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_past_the_context_says_so_to_the_client(refusing: Served, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "x" * 500}]
    with pytest.raises(openai.BadRequestError, match=f"context is {CONTEXT_TOKENS} tokens") as refused:
        refusing.client.chat.completions.create(model="fake", messages=messages, stream=stream)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("name", ["gpt-4o", "", "../fake", "\ud800"])
def test_an_unknown_model_is_a_404(refusing: Served, name: str) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        sent = json.dumps({**body, "model": name})
        answer = refusing.post(path, content=sent, headers={"Content-Type": "application/json"})
        assert error_of(answer, 404)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        refusing.client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"hi"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "fake", "prompt": }'],
    ids=lambda c: repr(c[:20]),
)
def test_a_malformed_body_is_a_400_and_not_a_422(refusing: Served, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        error_of(refusing.post(path, content=content, headers=headers), 400)


def test_a_body_that_is_no_json_by_its_type_is_a_400_that_says_which_type(refusing: Served) -> None:
    error = error_of(refusing.post("/v1/completions", data={"prompt": "hi"}), 400)
    assert "application/json" in error["message"]


def test_an_error_is_short_however_much_is_wrong(refusing: Served) -> None:
    messages = [{"role": 3, "content": 4}] * 5000
    answer = refusing.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
    assert "messages.0.role" in error_of(answer, 400)["message"] and len(answer.content) < 5000


def test_unknown_paths_and_methods_have_the_same_shape(refusing: Served) -> None:
    error_of(HTTP.get(f"{refusing.url}/v1/engines"), 404)
    answer = HTTP.get(f"{refusing.url}/v1/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_model_without_a_chat_template_refuses_chat_and_answers_completions(served: Served) -> None:
    served.engine.tokenizer.chat_template = None
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        served.client.chat.completions.create(**CHAT)
    assert served.client.completions.create(**COMPLETION).choices[0].text == "HI"


def test_a_model_without_a_tokenizer_is_refused_at_the_start() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        TextService(EngineQueue(lambda: FakeEngine(tokenizer=None)), model_name="fake")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code", "said"),
    [
        (InputError("prompt", expected="a", actual="b", remedy="c"), 400, None, "expected a, got b; c"),
        (DeviceLost("edge0 died"), 503, "device_lost", "edge0 died"),
        (Unsampled("no token can be chosen"), 500, "not_sampled", "no token can be chosen"),
        (RuntimeError("secret"), 500, None, "RuntimeError"),
    ],
    ids=["input", "lost", "unsampled", "internal"],
)
def test_what_the_engine_raises_before_the_first_token_is_a_status(
    served: Served, raised: Exception, status: int, code: str | None, said: str, stream: bool
) -> None:
    served.engine.error_before = raised
    error = error_of(served.post("/v1/completions", json={**COMPLETION, "stream": stream}), status)
    assert error["code"] == code
    assert said in error["message"]
    assert "secret" not in error["message"]


def test_an_error_after_the_first_byte_is_an_event_and_the_end(served: Served) -> None:
    served.engine.reply = lambda prompt: "the cat sat on the mat"
    served.engine.error_after = (3, RuntimeError("boom"))
    *texts, last = served.events("/v1/completions", {**COMPLETION, "stream": True})
    assert texts
    assert json.loads(last)["error"]["type"] == "server_error"
    with pytest.raises(openai.APIError, match="generation failed"):
        list(served.client.completions.create(**COMPLETION, stream=True))
    served.engine.error_after = None
    assert served.client.completions.create(**COMPLETION).choices[0].finish_reason == "stop", "goes on after it"
