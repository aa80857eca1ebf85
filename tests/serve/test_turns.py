from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_server import HTTP, Served, serving, wait_for
from fake_engine import FakeEngine

from serve_apps.engine_queue import EngineQueue
from splitray.errors import DeviceLost

LONG: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 150}


def test_three_callers_at_once_get_three_right_answers(served: Served) -> None:
    served.engine.delay_s = 0.002

    def ask(number: int) -> str:
        prompt = f"number {number}"
        if number % 2:
            stream = served.client.completions.create(model="fake", prompt=prompt, max_tokens=30, stream=True)
            return "".join(c.choices[0].text for c in stream)
        return served.client.completions.create(model="fake", prompt=prompt, max_tokens=30).choices[0].text

    with ThreadPoolExecutor(3) as callers:
        assert list(callers.map(ask, range(3))) == ["NUMBER 0", "NUMBER 1", "NUMBER 2"]
    assert all(r.ended for r in served.engine.runs)


def test_waiting_callers_are_served_in_the_order_they_came(served: Served) -> None:
    served.engine.delay_s = 0.01
    asked: list[threading.Thread] = []
    for number in range(4):
        body = {"model": "fake", "prompt": f"n{number}", "max_tokens": 30}
        asked.append(threading.Thread(target=served.post, args=("/v1/completions",), kwargs={"json": body}))
        asked[-1].start()
        time.sleep(0.05)
    for thread in asked:
        thread.join()
    prompts = [served.engine.tokenizer.decode(r.prompt_ids) for r in served.engine.runs]
    assert prompts == ["n0", "n1", "n2", "n3"]


def test_health_answers_while_a_generation_runs(served: Served) -> None:
    served.engine.delay_s, served.engine.ends = 0.02, False
    with HTTP.stream("POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}) as answer:
        next(answer.iter_text())
        assert HTTP.get(f"{served.url}/health", timeout=1).json() == {"status": "ok"}
        assert not served.engine.runs[0].ended
    wait_for(lambda: served.engine.runs[0].closed_early)


def test_a_client_that_leaves_a_stream_cancels_its_generation(served: Served) -> None:
    served.engine.delay_s, served.engine.ends = 0.02, False
    stream = served.client.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: served.engine.runs[0].closed_early)
    assert served.engine.runs[0].num_out < 100
    served.engine.delay_s, served.engine.ends = 0.0, True
    assert served.client.completions.create(**LONG).choices[0].text == "HI", "the next caller has its turn"


def test_a_client_that_leaves_before_its_whole_answer_cancels_its_generation(served: Served) -> None:
    served.engine.delay_s, served.engine.ends = 0.02, False
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{served.url}/v1/completions", json=LONG, timeout=0.3)
    wait_for(lambda: served.engine.runs[0].closed_early)
    assert served.engine.runs[0].num_out < 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_never_reaches_the_engine(served: Served, stream: bool) -> None:
    served.engine.delay_s, served.engine.ends = 0.01, False
    body = {**LONG, "max_tokens": 60}
    first = threading.Thread(target=served.post, args=("/v1/completions",), kwargs={"json": body})
    first.start()
    wait_for(lambda: served.engine.runs)
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{served.url}/v1/completions", json={**LONG, "stream": stream}, timeout=0.2)
    first.join()
    last = served.client.completions.create(model="fake", prompt="last", max_tokens=2)
    assert last.usage is not None and last.usage.completion_tokens == 2
    assert len(served.engine.runs) == 2


def test_a_lost_engine_is_a_503_on_health_and_for_every_later_caller(served: Served) -> None:
    served.engine.error_after = (1, DeviceLost("cloud0 closed its connection"))
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="cloud0 closed") as failed:
            served.client.completions.create(**LONG)
        assert (failed.value.status_code, failed.value.code) == (503, "device_lost")
    health = HTTP.get(f"{served.url}/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "device_lost")
    assert len(served.engine.runs) == 1, "a lost engine is not asked again"


def test_an_engine_that_recovers_is_asked_again(served: Served) -> None:
    served.engine.recovers = True
    served.engine.error_after = (1, DeviceLost("cloud0 closed its connection"))
    with pytest.raises(openai.InternalServerError, match="cloud0 closed") as failed:
        served.client.completions.create(**LONG)
    assert (failed.value.status_code, failed.value.code) == (503, "device_lost")
    assert HTTP.get(f"{served.url}/health").status_code == 200
    served.engine.error_after = None
    assert served.client.completions.create(**LONG).choices[0].text


def test_an_engine_that_knows_it_is_lost_is_a_503_on_health(served: Served) -> None:
    served.engine.lost = "edge0: exit code -9"
    assert HTTP.get(f"{served.url}/health").json()["error"]["message"] == "edge0: exit code -9"
    assert served.post("/v1/completions", json=LONG).status_code == 503


def test_the_end_of_the_server_ends_a_running_generation() -> None:
    engine = FakeEngine(delay_s=0.05, ends=False)
    with serving(engine) as served:
        stream = served.client.completions.create(**{**LONG, "max_tokens": 190}, stream=True)
        next(iter(stream))
    assert engine.runs[0].closed_early
    assert engine.closed
    stream.close()


def test_a_launch_that_fails_says_why_and_leaves_no_thread() -> None:
    def launch() -> FakeEngine:
        raise DeviceLost("edge0 did not answer")

    with pytest.raises(DeviceLost, match="edge0"):
        EngineQueue(launch)
    wait_for(lambda: not any(t.name.startswith("engine") for t in threading.enumerate()))
