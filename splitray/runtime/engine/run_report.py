"""What a run cost, added up over its segments."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitray.runtime.wire.answers import Counts

_SUMMED = ("messages", "payload_bytes", "wire_bytes", "decode_cpu_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What one run cost. Bytes and messages are of its decode steps, over all devices, per step."""

    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    messages_per_token: float
    bytes_per_token: float
    wire_bytes_per_token: float
    driver_bytes_per_token: float
    decode_cpu_s: float
    kv_bytes: dict[str, int]


@dataclass(slots=True)
class Meter:
    """Adds up the segments of one run."""

    started: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0.0))
    steps: int = 0
    kv_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, counts: Mapping[str, Counts]) -> None:
        """Add one segment: what each device counted, by its name."""
        self.steps += max((c.steps for c in counts.values()), default=0)
        for key in _SUMMED:
            self.sums[key] += sum(getattr(c, key) for c in counts.values())
        self.kv_bytes = {d: c.kv_bytes for d, c in counts.items()}

    def report(self, batch: int) -> RunReport:
        """What the run cost, of `batch` sequences."""
        each, arrivals = max(self.steps, 1), self.arrivals
        spread = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else None
        return RunReport(
            new_tokens=len(arrivals),
            ttft_s=arrivals[0] - self.started if arrivals else 0.0,
            tpot_s=None if spread is None else spread / (len(arrivals) - 1),
            messages_per_token=self.sums["messages"] / each,
            bytes_per_token=self.sums["payload_bytes"] / each,
            wire_bytes_per_token=self.sums["wire_bytes"] / each,
            driver_bytes_per_token=4.0 * batch,
            decode_cpu_s=self.sums["decode_cpu_s"],
            kv_bytes=self.kv_bytes,
        )
