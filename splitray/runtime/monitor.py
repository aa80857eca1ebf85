"""The cluster as it is now: rate and round trip of each link that a run uses, by probes between the devices.

Each device times small and larger frames to its peers over its own connections, a hundredth of what the link carries.
Smoothed; a link that gives no answer is left out. What the run itself sends is not timed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from splitray.errors import DeviceLost
from splitray.runtime.asking import ask
from splitray.runtime.epoch import astuple
from splitray.topology import Link, Topology

if TYPE_CHECKING:
    from splitray.runtime.engine import Engine

_WITHIN_S = 2.0
_LEAST_BYTES, _MOST_BYTES = 1_500, 262_144
_SHARE = 0.01  # of a link, for probes
CHANGE = 0.3  # of the tokens' pace, which brings the next probe forward
SOONEST_S = 0.25  # between two probes then


def probe_period_s(bandwidth_bytes_per_s: float, *, least_s: float = 1.0, most_s: float = 10.0) -> float:
    """Between probes of a link, so that both directions together take a hundredth of it."""
    return min(most_s, max(least_s, 2 * _LEAST_BYTES / (_SHARE * max(1.0, bandwidth_bytes_per_s))))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A link at a time (monotonic seconds)."""

    bandwidth_bytes_per_s: float
    rtt_s: float
    at_s: float


@dataclass
class Estimates:
    """What is known of links, by (source, target).

    Args:
        weight: of a new measurement; 1 forgets the old ones.
        stale_s: age after which an estimate counts for nothing and the topology's own figure stands again.
    """

    weight: float = 0.5
    stale_s: float = 10.0
    links: dict[tuple[str, str], Estimate] = field(default_factory=dict)

    def take(self, pair: tuple[str, str], bandwidth_bytes_per_s: float, rtt_s: float, now_s: float) -> None:
        """Smooth one measurement in; one that is very different from the last counts whole, as links flip."""
        before, w = self.links.get(pair), self.weight
        if before is not None and bandwidth_bytes_per_s > 0 and before.bandwidth_bytes_per_s > 0:
            ratio = bandwidth_bytes_per_s / before.bandwidth_bytes_per_s
            if 0.5 < ratio < 2.0:
                bandwidth_bytes_per_s = before.bandwidth_bytes_per_s * (1 - w) + w * bandwidth_bytes_per_s
                rtt_s = before.rtt_s * (1 - w) + w * rtt_s
        self.links[pair] = Estimate(bandwidth_bytes_per_s, rtt_s, now_s)

    def seen(self, topology: Topology, now_s: float) -> Topology:
        """A topology with these links; those that do not answer are left out."""
        links = []
        for link in topology.links:
            found = self.links.get((link.source, link.target))
            if found is None or now_s - found.at_s > self.stale_s:
                links.append(link)
            elif found.bandwidth_bytes_per_s > 0:
                links.append(replace(link, bandwidth_bytes_per_s=found.bandwidth_bytes_per_s, rtt_s=found.rtt_s))
        return replace(topology, links=tuple(links))


@dataclass
class Monitor:
    """Probes the links of an engine.

    Args:
        engine: whose.
        period_s: between probes of a link.
    """

    engine: Engine
    period_s: float = 1.0
    estimates: Estimates = field(default_factory=Estimates)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Probe in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="splitray-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Probe no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def topology(self) -> Topology:
        """The engine's topology with what is known of its links; links that do not answer are left out."""
        return self.estimates.seen(self.engine.topology, time.monotonic())

    def look(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Probe links, each in both directions, one after the other."""
        for a, b in pairs:
            size = self.probe_bytes(a, b)
            order = {"peer": b, "endpoint": astuple(self.engine.endpoints[b]), "bytes": size, "within_s": _WITHIN_S}
            try:
                answer = ask({a: ("probe", order)}, self.engine.endpoints, self.engine.fleet.token,
                             within_s=3 * _WITHIN_S)[a]  # fmt: skip
            except DeviceLost:
                answer = {"there_bytes_per_s": 0.0, "back_bytes_per_s": 0.0, "rtt_s": 0.0}
            self.estimates.take((a, b), answer["there_bytes_per_s"], answer["rtt_s"], time.monotonic())
            self.estimates.take((b, a), answer["back_bytes_per_s"], answer["rtt_s"], time.monotonic())

    def probe_bytes(self, a: str, b: str) -> int:
        """A hundredth of what the link carries in a period."""
        known = self.estimates.links.get((a, b))
        link: Link | None = self.engine.topology.link(a, b)  # type: ignore[arg-type]
        rate = known.bandwidth_bytes_per_s if known and known.bandwidth_bytes_per_s else None
        rate = rate or (link.bandwidth_bytes_per_s if link else 0.0)
        return int(min(_MOST_BYTES, max(_LEAST_BYTES, _SHARE * rate * self.period_s)))

    def _run(self) -> None:
        while not self._stop.wait(self.period_s):
            self.look(self.engine.now.dials())
