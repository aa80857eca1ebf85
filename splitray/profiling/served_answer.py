"""An answer of the served API as a client sees it, token by token and with its times."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from splitray.errors import DeviceLost

_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAnswer:
    """What a client of the API saw: the text token by token, and when."""

    pieces: tuple[str, ...]
    num_tokens: int
    ttft_s: float
    tpot_s: float | None
    longest_gap_s: float


def ask(url: str, body: dict[str, Any], *, tell: Callable[[str], None]) -> ServedAnswer:
    """Ask for a completion, streamed; `tell` gets each piece of text as it comes.

    Raises:
        DeviceLost: the application does not answer, or answers with an error.
    """
    started = time.perf_counter()
    pieces, arrivals, num_tokens = [], [], 0
    for event in _events(url, {**body, "stream": True, "stream_options": {"include_usage": True}}):
        if "error" in event:
            raise DeviceLost(event["error"]["message"])
        if event["choices"] and event["choices"][0]["text"]:
            arrivals.append(time.perf_counter())
            pieces.append(event["choices"][0]["text"])
            tell(pieces[-1])
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    spread = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else None
    return ServedAnswer(
        pieces=tuple(pieces),
        num_tokens=num_tokens,
        ttft_s=arrivals[0] - started if arrivals else time.perf_counter() - started,
        tpot_s=None if spread is None else spread / (num_tokens - 1),
        longest_gap_s=max((b - a for a, b in zip(arrivals, arrivals[1:], strict=False)), default=0.0),
    )


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer, or the one error in its place."""
    with _connection(url) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            yield json.load(response)
            return
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            if data:
                yield json.loads(data)


def stats(url: str) -> dict[str, Any]:
    """What the application tells of its engine.

    Raises:
        DeviceLost: it does not answer.
    """
    with _connection(url) as connection:
        connection.request("GET", "/v1/stats")
        values: dict[str, Any] = json.load(connection.getresponse())
    return values


@contextmanager
def _connection(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    assert parts.hostname is not None, "the URL is our own"
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_ANSWER_S)
    try:
        yield connection
    except (OSError, http.client.HTTPException) as error:
        raise DeviceLost(f"the served model does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
