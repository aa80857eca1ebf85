"""Times of an engine's devices and links as its own code finds them: for profiles and benches, between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitray.runtime.wire.answers import RoundTrips
from splitray.runtime.wire.messages import EchoOrder, SpeedsOrder
from splitray.runtime.wire.packing import to_plain

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine


def echo(engine: Engine, a: str, b: str, *, size: int, rounds: int) -> list[float]:
    """Round trips in seconds of frames of `size` bytes between two devices, through the wire code."""
    return _echo(engine, a, b, size=size, rounds=rounds, cold_bytes=0)[a].round_trip_s


def hops(engine: Engine, a: str, b: str, *, size: int, rounds: int, cold_bytes: int) -> list[float]:
    """One-way times of such frames where each side reads weights, and the other one sleeps, in between."""
    told = _echo(engine, a, b, size=size, rounds=rounds, cold_bytes=cold_bytes)
    return [
        (there_and_back - worked) / 2
        for there_and_back, worked in zip(told[a].round_trip_s, told[b].worked_s, strict=True)
    ]


def speeds(engine: Engine, device: str, *, cold_bytes: int) -> dict[str, float]:
    """How fast a device multiplies and copies while the others sleep; see runtime/device/speed.py."""
    with engine.alone():
        engine.members.order(device, SpeedsOrder(cold_bytes=cold_bytes))
        return to_plain(engine.members.replies({device})[device])


def _echo(engine: Engine, a: str, b: str, *, size: int, rounds: int, cold_bytes: int) -> dict[str, RoundTrips]:
    with engine.alone():
        attempt = engine.attempt()
        for device, peer in ((a, b), (b, a)):
            order = EchoOrder(peer=peer, first=device == a, attempt=attempt, size=size, rounds=rounds,
                              cold_bytes=cold_bytes)  # fmt: skip
            engine.members.order(device, order)
        return engine.members.replies({a, b})
