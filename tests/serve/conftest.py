from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from api_server import Served, serving
from fake_engine import FakeEngine

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def served() -> Iterator[Served]:
    """A server whose engine the test scripts; a fresh one each."""
    engine = FakeEngine()
    with serving(engine) as served:
        yield served
    assert engine.closed, "the end of the server closes the engine"
    assert len(engine.threads) <= 1, "one thread has the engine"
