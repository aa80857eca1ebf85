"""The API under a real Ray Serve, with the shipped model, driven by the real client."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from splitray.local_ray import free_port

pytestmark = [pytest.mark.serve, pytest.mark.slow]

PROMPT = "Return the"
NUM_NEW = 24


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray and Serve on a free port; afterwards not one of their processes is left."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray import serve

    ray.shutdown()  # of the cluster that the tests of the fleets may still hold this process in
    before = set(psutil.Process().children(recursive=True))
    port = free_port("127.0.0.1", 0)
    # Ray's socket paths must stay short, pytest's own directories are not.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        started: set[psutil.Process] = set()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
            started = set(psutil.Process().children(recursive=True)) - before
            serve.shutdown()
        finally:
            ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=15)
    assert not left


@pytest.fixture(scope="module", params=["process", pytest.param("ray", marks=pytest.mark.full)])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[openai.OpenAI]:
    """The shipped model over two devices."""
    from ray import serve

    from serve_apps.generate import Args, build

    serve.run(build(Args(model="tiny", devices=2, planner="even", runtime=request.param)), name="generate")
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    serve.delete("generate")


@pytest.fixture(scope="module")
def greedy() -> str:
    """What transformers itself says."""
    from importlib.resources import files

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(files("splitray") / "model" / "shipped")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_client_gets_transformers_greedy_text_whole_and_streamed(client: openai.OpenAI, greedy: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": NUM_NEW, "temperature": 0}
    answer = client.completions.create(**body)
    assert answer.choices[0].text == greedy
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == greedy
    assert chunks[-1].usage == answer.usage
    assert len(chunks) > 3


def test_chat_models_health_and_refusals_pass_through_serve(client: openai.OpenAI, url: str) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    messages: Any = [{"role": "user", "content": "hello"}]
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, stream=True)
    assert [c.choices[0].delta.role for c in stream][0] == "assistant"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a " * 20_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")
    with pytest.raises(openai.BadRequestError):
        client.post("/completions", body={"model": "tiny"}, cast_to=object)


def test_a_client_that_leaves_does_not_block_the_next(client: openai.OpenAI, greedy: str) -> None:
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NUM_NEW, stream=True)
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NUM_NEW, temperature=0)
    assert answer.choices[0].text == greedy


def test_stats_tell_what_the_last_run_cost_and_who_holds_what(client: openai.OpenAI, url: str) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NUM_NEW, temperature=0)
    stats = httpx.get(f"{url}/v1/stats").json()
    assert answer.usage is not None
    assert stats["run"]["new_tokens"] == answer.usage.completion_tokens
    assert stats["run"]["bytes_per_token"] > 0
    assert stats["exchanges_per_token"] == 26  # 12 layers partitioned on two devices, and the head
    assert set(stats["devices"]) == {"edge0", "cloud0"}
    assert set(stats["placement"]) == {"layers", "embedding", "head"}


def test_a_request_whose_device_dies_goes_on_and_its_text_is_unchanged(client: openai.OpenAI, url: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "temperature": 0.8, "seed": 5}
    wanted = client.completions.create(**body).choices[0].text
    for device in ("cloud0", "edge0"):
        pid = _all_there(url)[device]["pid"]
        pieces = []
        for chunk in client.completions.create(**body, stream=True):
            pieces.append(chunk.choices[0].text)
            if len(pieces) == 10:
                os.kill(pid, signal.SIGKILL)
        assert "".join(pieces) == wanted
    assert client.completions.create(**body).choices[0].text == wanted


def _all_there(url: str) -> dict:
    """Both devices, once who was left out has come back."""
    give_up = time.monotonic() + 60
    while True:
        devices = httpx.get(f"{url}/v1/stats", timeout=30).json()["devices"]
        if len(devices) == 2 or time.monotonic() > give_up:
            return devices
        time.sleep(0.2)
