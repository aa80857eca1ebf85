"""The cluster as it is now: rate and round trip of each link that a run uses, load and free memory of each device.

Each device times small and larger frames to its peers over its own connections, a hundredth of what the link carries.
The run's own tokens say when to look sooner: their pace changes with the links. Smoothed; a link that gives no answer
is left out, and what is too old counts for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from splitray.cost import memory_bytes
from splitray.errors import DeviceFailed, DeviceLost, InputError
from splitray.runtime.engine.epoch import Epoch
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.policy import without
from splitray.runtime.engine.session import Session
from splitray.runtime.wire.answers import LinkRates, MachineLoad
from splitray.runtime.wire.messages import BusyOrder, ProbeOrder
from splitray.topology import Device, Link, Topology

logger = logging.getLogger(__name__)
_WITHIN_S = 1.0
_LEAST_BYTES, _MOST_BYTES = 1_500, 131_072
_SHARE = 0.01  # of a link, for probes
CHANGE = 0.3  # of the tokens' pace, which brings the next probe forward
SOONEST_S = 0.25  # between two probes then
_TICK_S = 0.05
_DEVICES_EVERY = 4  # looks at links
_GROWS = 8  # times, from one probe to the next
_LEAST_SHARE = 0.1


def probe_period_s(bandwidth_bytes_per_s: float, *, least_s: float = 1.0, most_s: float = 10.0) -> float:
    """Between probes of a link, so that both directions together take a hundredth of it."""
    return min(most_s, max(least_s, 2 * _LEAST_BYTES / (_SHARE * max(1.0, bandwidth_bytes_per_s))))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A link at a time (monotonic seconds)."""

    bandwidth_bytes_per_s: float
    rtt_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Condition:
    """A device at a time: bytes that are free beside what it holds, and the share of its machine that others leave."""

    free_bytes: float
    share: float
    at_s: float


@dataclass
class Estimates:
    """What is known of links, by (source, target), and of devices.

    Args:
        weight: of a new measurement; 1 forgets the old ones.
        stale_s: age after which an estimate counts for nothing and the topology's own figure stands again.
    """

    weight: float = 0.5
    stale_s: float = 10.0
    links: dict[tuple[str, str], Estimate] = field(default_factory=dict)
    devices: dict[str, Condition] = field(default_factory=dict)
    held_bytes: dict[str, float] = field(default_factory=dict)
    """What the engine itself has on each device."""

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
        """A topology with these links and devices; links that do not answer are left out."""
        links = []
        for link in topology.links:
            found = self.links.get((link.source, link.target))
            if found is None or now_s - found.at_s > self.stale_s:
                links.append(link)
            elif found.bandwidth_bytes_per_s > 0:
                links.append(replace(link, bandwidth_bytes_per_s=found.bandwidth_bytes_per_s, rtt_s=found.rtt_s))
        devices = tuple(self._seen(d, now_s) for d in topology.devices)
        return replace(topology, links=tuple(links), devices=devices)

    def _seen(self, device: Device, now_s: float) -> Device:
        found = self.devices.get(device.id)
        if found is None or now_s - found.at_s > self.stale_s:
            return device
        memory = min(device.memory_bytes, found.free_bytes + self.held_bytes.get(device.id, 0.0))
        return replace(device.slowed(found.share), memory_bytes=memory)

    def met(self, loads: Mapping[str, MachineLoad], now_s: float) -> None:
        """Take in what devices say of their machines (runtime/device/busy.py), which several may share."""
        for device, load in loads.items():
            ours = sum(x.own_cores for x in loads.values() if x.machine == load.machine)
            others = max(0.0, load.busy_cores - ours) / load.cores
            before = self.devices.get(device)
            share = max(_LEAST_SHARE, 1.0 - others)
            if before is not None:
                share = before.share * (1 - self.weight) + self.weight * share
            beside = sum(x.machine == load.machine for x in loads.values())
            self.devices[device] = Condition(load.free_bytes / beside, share, now_s)


class Watched(Protocol):
    """What a monitor sees of an engine."""

    members: Members
    tokens: int

    @property
    def now(self) -> Epoch:
        """The epoch that runs."""

    @property
    def progress(self) -> Session | None:
        """The run that goes on, or None."""


@dataclass
class Monitor:
    """Probes the links of an engine.

    Args:
        engine: whose.
        period_s: between probes, at least; longer where a link is so slow that they would take more than their share.
    """

    engine: Watched
    period_s: float = 1.0
    estimates: Estimates = field(default_factory=Estimates)
    _size: dict[tuple[str, str], int] = field(default_factory=dict)
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
        """The engine's topology with what is known of its links.

        Links that do not answer are left out, and so are devices that are not there and could not be started.
        """
        now, members = self.engine.now, self.engine.members
        away = [d for d in members.starts.failures if d not in members.endpoints and d not in now.route.devices]
        return self.estimates.seen(without(now.topology, away) if away else now.topology, time.monotonic())

    def look(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Probe links, each in both directions, one after the other."""
        members = self.engine.members
        for a, b in pairs:
            size = self.probe_bytes(a, b)
            order = ProbeOrder(peer=b, endpoint=members.endpoints[b], num_bytes=size, within_s=_WITHIN_S)
            try:
                answer = members.ask({a: order}, within_s=3 * _WITHIN_S)[a]
                self._size[a, b] = size
            except DeviceLost:  # gone, or too slow for so many bytes by now: the next probe is small
                most = size / _WITHIN_S if size > _LEAST_BYTES else 0.0
                answer = LinkRates(there_bytes_per_s=most, back_bytes_per_s=most, rtt_s=0.0)
                self._size.pop((a, b), None)
            self.estimates.take((a, b), answer.there_bytes_per_s, answer.rtt_s, time.monotonic())
            self.estimates.take((b, a), answer.back_bytes_per_s, answer.rtt_s, time.monotonic())

    def probe_bytes(self, a: str, b: str) -> int:
        """A hundredth of what the link carries in a period; less at first, as the link may carry less than was said."""
        share = _SHARE * self._rate(a, b) * self.period_s
        return int(min(_MOST_BYTES, max(_LEAST_BYTES, min(share, _GROWS * self._size.get((a, b), 0)))))

    def _rate(self, a: str, b: str) -> float:
        known = self.estimates.links.get((a, b))
        link: Link | None = self.engine.now.topology.link(a, b)  # type: ignore[arg-type]
        rate = known.bandwidth_bytes_per_s if known and known.bandwidth_bytes_per_s else None
        return rate or (link.bandwidth_bytes_per_s if link else 0.0)

    def look_at_devices(self) -> None:
        """Ask them how busy their machines are and how much memory is free."""
        engine = self.engine
        loads = engine.members.ask(dict.fromkeys(engine.members.endpoints, BusyOrder()), within_s=_WITHIN_S)
        self.estimates.held_bytes = {
            str(d): float(b) for d, b in memory_bytes(engine.now.placement, engine.now.arch, 0).items()
        }
        self.estimates.met(loads, time.monotonic())

    def _run(self) -> None:
        tokens, at_s, pace_s, probed_s, looks = self.engine.tokens, time.monotonic(), 0.0, 0.0, 0
        while not self._stop.wait(_TICK_S) and self.engine.members.lost is None:
            now_s, seen = time.monotonic(), self.engine.tokens
            sooner = False
            if seen > tokens:
                token_s = (now_s - at_s) / (seen - tokens)
                sooner = pace_s > 0 and abs(token_s - pace_s) > CHANGE * pace_s and now_s - probed_s >= SOONEST_S
                tokens, at_s, pace_s = seen, now_s, token_s if sooner or not pace_s else 0.5 * (pace_s + token_s)
            if self.engine.progress is None:
                at_s = now_s
            pairs = self.engine.now.dials() or self._idle_pairs()
            slowest = min((self._rate(a, b) for a, b in pairs), default=float("inf"))
            if sooner or now_s - probed_s >= probe_period_s(slowest, least_s=self.period_s):
                try:
                    self.look(pairs)
                    if looks % _DEVICES_EVERY == 0:
                        self.look_at_devices()
                except (DeviceLost, DeviceFailed, InputError, KeyError) as error:  # the recovery's business
                    logger.info("no look this time: %s", error)
                looks, probed_s = looks + 1, time.monotonic()
                tokens, at_s = self.engine.tokens, probed_s  # probes share the link: they are not the tokens' pace

    def _idle_pairs(self) -> list[tuple[str, str]]:
        """Links that nothing uses now, from the origin: they decide whether something should."""
        engine = self.engine
        origin, known = str(engine.now.topology.origin), engine.members.endpoints
        return [(origin, d) for d in known if d != origin and origin in known]
