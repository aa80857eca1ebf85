"""Any body of a request gets an answer or a refusal in OpenAI's error shape, and never a failure of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from api_server import Served, serving
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_apps.api_error import as_api_error, validation_error
from serve_apps.engine_queue import EngineQueue
from serve_apps.protocol import NEUTRAL, TOLERATED, ChatRequest, CompletionRequest
from serve_apps.service import TextService, whole

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["hi", "<|im_end|>", "\ud800", "a\0b", "</think>", "{{ 1 // 0 }}", "x" * 999]
)
NUMBERS = st.integers(-3, 400) | st.integers() | st.floats() | st.sampled_from([10**30, 2**63, -(2**63), 1e-45, 1e308])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def likely(wanted: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what is wanted, so that requests come far."""
    return st.integers(0, 9).flatmap(lambda n: ANY if n == 9 else wanted)


PART = likely(st.fixed_dictionaries({"type": likely(st.just("text")), "text": likely(TEXTS)}))
ROLES = st.sampled_from(["user", "user", "user", "assistant", "system", "developer", "tool"])
CONTENT = likely(TEXTS | st.lists(PART, max_size=3))
MESSAGE = likely(st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"name": likely(TEXTS)}))
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": likely(st.integers(1, 9) | NUMBERS),
    "temperature": likely(st.floats(0, 2) | NUMBERS),
    "top_p": likely(st.floats(0, 1)),
    "seed": likely(st.integers()),
    "stop": likely(TEXTS | st.lists(TEXTS, max_size=5)),
    "stream": likely(st.booleans()),
    "stream_options": likely(st.just({"include_usage": True})),
    "add_special_tokens": likely(st.booleans()),
    "skip_special_tokens": likely(st.booleans()),
    "add_generation_prompt": likely(st.booleans()),
    "continue_final_message": likely(st.booleans()),
    "chat_template_kwargs": likely(st.dictionaries(TEXTS, ANY, max_size=2)),
    **{name: likely(st.sampled_from(values)) for name, values in NEUTRAL.items()},
    **{name: ANY for name in TOLERATED},
}  # fmt: skip
PROMPT = likely(TEXTS | st.lists(st.integers(0, 299), max_size=5) | st.lists(TEXTS, max_size=3))


def bodies(own: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.sets(st.sampled_from(sorted(KNOWN)), max_size=2)
    some = few.flatmap(lambda names: st.fixed_dictionaries({name: KNOWN[name] for name in sorted(names)}))
    asked = st.fixed_dictionaries({"model": st.just("fake"), own: values})
    return likely(st.builds(lambda a, b: {**a, **b}, asked, some | st.dictionaries(TEXTS, ANY, max_size=1)))


BODIES: dict[str, tuple[type[CompletionRequest] | type[ChatRequest], st.SearchStrategy[Any]]] = {
    "completions": (CompletionRequest, bodies("prompt", PROMPT)),
    "chat/completions": (ChatRequest, bodies("messages", likely(st.lists(MESSAGE, min_size=1, max_size=3)))),
}
ONLY_FUZZ: dict[str, Any] = {"derandomize": True, "database": None, "deadline": timedelta(seconds=20),
             "suppress_health_check": list(HealthCheck)}  # fmt: skip


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.full)])
@pytest.mark.parametrize("route", BODIES)
def test_any_request_is_answered_or_refused(route: str, examples: int) -> None:
    kind, requests = BODIES[route]
    queue = EngineQueue(FakeEngine)
    service = TextService(queue, model_name="fake", trust_request_chat_template=True)
    answered = 0

    @settings(max_examples=examples, **ONLY_FUZZ)
    @given(requests)
    def holds(body: Any) -> None:
        nonlocal answered
        try:
            request = kind.model_validate(body)
        except ValidationError as error:
            refused = validation_error([{**e, "loc": ("body", *e["loc"])} for e in error.errors()])
            assert refused.status == 400 and json.dumps(refused.body)
            return
        try:
            jobs = service.jobs(request)
            json.dumps(asyncio.run(whole(service.reply(request), jobs, service.pieces(jobs))))
            answered += 1
        except Exception as error:
            refused = as_api_error(error)
            assert refused.status in (400, 404), error
            assert set(refused.body["error"]) == {"message", "type", "param", "code"} and json.dumps(refused.body)

    holds()
    queue.close()
    assert answered > examples // 20, "requests come through"


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving(FakeEngine()) as served:
        yield served


@pytest.mark.parametrize("route", BODIES)
def test_any_bytes_over_http_are_answered_or_refused(shared: Served, route: str) -> None:
    documents = BODIES[route][1].map(lambda body: json.dumps(body).encode())
    cut = st.builds(lambda raw, at: raw[: at % (len(raw) + 1)], documents, st.integers(0, 999))
    deep = st.sampled_from(
        [b"[" * 100_000, b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"n": ' + b"9" * 9999 + b"}"]
    )

    @settings(max_examples=100, **ONLY_FUZZ)
    @given(documents | documents | cut | deep | st.binary(max_size=40))
    def holds(content: bytes) -> None:
        answer = shared.post(f"/v1/{route}", content=content, headers={"Content-Type": "application/json"})
        if answer.status_code == 200:
            return
        assert answer.status_code in (400, 404), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 20_000

    holds()
