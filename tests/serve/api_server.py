"""The API over a fake engine behind a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from fake_engine import FakeEngine

from serve_apps.app import make_app
from serve_apps.engine_queue import EngineQueue
from serve_apps.service import TextService

# One for all: building the TLS context of a client costs more than most tests here.
HTTP = httpx.Client(timeout=20)


@dataclass
class Served:
    """A real server on a free port of the loopback, and how to reach it."""

    url: str
    engine: FakeEngine
    service: TextService

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=HTTP)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return HTTP.post(f"{self.url}{path}", **options)

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The data of each event of a streamed answer."""
        with HTTP.stream("POST", f"{self.url}{path}", json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = answer.read().decode()
        assert text.endswith("\n\n")
        blocks = text.removesuffix("\n\n").split("\n\n")
        assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
        return [b.removeprefix("data: ") for b in blocks]


@contextmanager
def serving(engine: FakeEngine, **options: Any) -> Iterator[Served]:
    service = TextService(EngineQueue(lambda: engine), model_name="fake", seed=3, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service), log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, service)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def wait_for(condition: Callable[[], object], *, deadline_s: float = 10.0) -> None:
    """Poll until it holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
