"""What a planner is put to: one model on one topology, requests, and everything that changes while they are served.

Arrays over time are given slot by slot and hold for the slot. A planner sees the present slot's rates and nothing of
the next one. Shapes: T slots, D devices in the topology's order; links are [source, target].
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Bools, Floats
from splitray.codecs import Codec
from splitray.cost import Rates
from splitray.errors import InputError
from splitray.planners.protocol import RequestShape
from splitray.quality.accuracy import Accuracy
from splitray.queues import Budgets
from splitray.sim.workload import Requests
from splitray.topology import Device, DeviceId, Link, Topology

_MOST_BACKGROUND = 0.95  # of a device, that other work may take


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run: `name` and `topology` say where, the rest what happens.

    Args:
        requests: longer ones than the model's window are cut to it (`num_cut` counts them).
        bandwidth_bytes_per_s: of the links whose rate changes, [T] each; 0 is an outage.
        rtt_s: of the links whose round trip changes, [T] each.
        background: share of a device's compute and memory bandwidth that other work takes, [T, D].
        background_memory: it takes the same share of memory too.
        lost: devices that are gone, [T, D]; never the origin.
        budgets: what the virtual queues hold the means to.
        staged: every device has the weights on its own disk, so that only KV moves.
        reserve: planners keep room for the longest request from the start; otherwise for the present one and the
            tokens of an interval only.
        mean_request: of the whole service, where these requests are one line of many.
    """

    name: str
    arch: ModelArch
    topology: Topology
    requests: Requests
    num_slots: int
    slot_s: float = 1.0
    bandwidth_bytes_per_s: dict[tuple[DeviceId, DeviceId], Floats] = field(default_factory=dict)
    rtt_s: dict[tuple[DeviceId, DeviceId], Floats] = field(default_factory=dict)
    background: Floats | None = None
    background_memory: bool = True
    lost: Bools | None = None
    budgets: Budgets = Budgets()
    codec: Codec = "none"
    accuracy: Accuracy | None = None
    staged: bool = True
    reserve: bool = True
    interval_tokens: int = 64
    mean_request: RequestShape | None = None
    num_cut: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Check the arrays and cut requests to the model's window."""
        shape = (self.num_slots, len(self.topology.ids))
        if self.num_slots < 1 or not self.slot_s > 0:
            raise _wrong("slots", "at least one slot longer than 0 s", f"{self.num_slots} of {self.slot_s} s")
        for what in ("bandwidth_bytes_per_s", "rtt_s"):
            for pair, values in getattr(self, what).items():
                if self.topology.link(*pair) is None:
                    raise _wrong(what, "a link of the topology", f"{pair[0]} -> {pair[1]}")
                if values.shape != shape[:1] or not (np.isfinite(values).all() and (values >= 0).all()):
                    raise _wrong(f"{what} of {pair[0]} -> {pair[1]}", f"{shape[0]} values of 0 or more", values)
        if self.background is not None and not (
            self.background.shape == shape and (self.background >= 0).all() and (self.background <= 1).all()
        ):
            raise _wrong("background", f"shares from 0 to 1, {shape}", self.background.shape)
        if self.lost is not None:
            if self.lost.shape != shape:
                raise _wrong("lost", f"flags, {shape}", self.lost.shape)
            if self.lost[:, self.topology.index[self.topology.origin]].any():
                raise _wrong("lost", "devices other than the origin, where requests start and end", "the origin")
        asked, fitting = self.requests, self.requests.within(self.arch.context_tokens)
        cut = (fitting.prompt_tokens < asked.prompt_tokens) | (fitting.output_tokens < asked.output_tokens)
        object.__setattr__(self, "num_cut", int(cut.sum()))
        object.__setattr__(self, "requests", fitting)

    @property
    def longest_tokens(self) -> int:
        """Prompt and output of the longest request, 1 if there is none."""
        return int((self.requests.prompt_tokens + self.requests.output_tokens).max(initial=1))

    @cached_property
    def shape(self) -> RequestShape | None:
        """The mean request of the run, which whoever runs the service knows; None if there is none."""
        if self.mean_request is not None:
            return self.mean_request
        line = self.requests
        return RequestShape(float(line.prompt_tokens.mean()), float(line.output_tokens.mean())) if len(line) else None

    @property
    def varies(self) -> bool:
        """Whether anything but the queues changes."""
        return bool(self.bandwidth_bytes_per_s or self.rtt_s) or self.background is not None or self.lost is not None

    @cached_property
    def free_share(self) -> Floats:
        """Share of each device that is left to us in each slot, [T, D]."""
        if self.background is None:
            return np.ones((self.num_slots, len(self.topology.ids)))
        return 1 - np.minimum(self.background, _MOST_BACKGROUND)

    def memory_at(self, slot: int) -> Floats:
        """Bytes of memory that each device has left for the model in a slot, [D]."""
        memory = np.array([d.memory_bytes for d in self.topology.devices])
        return memory * self.free_share[slot] if self.background_memory else memory

    def rates_among(self, devices: Collection[DeviceId]) -> Rates:
        """The rates of some devices, the origin one of them, in every slot (N = T)."""
        where = self.topology.among(devices)
        base, index, at = Rates.of(where, self.arch), where.index, [self.topology.index[d] for d in where.ids]
        many: dict[str, Any] = {
            f.name: np.repeat(getattr(base, f.name), self.num_slots, axis=0)
            for f in fields(Rates)
            if f.name != "medium"
        }
        many["flops_per_s"] *= self.free_share[:, at]
        many["bytes_per_s"] *= self.free_share[:, at]
        for name, of, share in (("link_bytes_per_s", self.bandwidth_bytes_per_s, 1.0), ("latency_s", self.rtt_s, 0.5)):
            for (a, b), values in of.items():
                if a in index and b in index:
                    many[name][:, index[a], index[b]] = values * share
        return replace(base, **many)

    def topology_at(self, slot: int) -> Topology:
        """What there is in a slot: a link in an outage and a lost device are not."""
        return self._build(slot) if self.varies else self.topology

    def _build(self, slot: int) -> Topology:
        ids = self.topology.ids
        gone = set() if self.lost is None else {ids[i] for i in np.flatnonzero(self.lost[slot])}
        links = []
        for link in self.topology.links:
            pair = link.source, link.target
            rate, rtt = self.bandwidth_bytes_per_s.get(pair), self.rtt_s.get(pair)
            if gone & set(pair) or (rate is not None and rate[slot] <= 0):
                continue
            if rate is not None:
                link = replace(link, bandwidth_bytes_per_s=float(rate[slot]))
            links.append(link if rtt is None else replace(link, rtt_s=float(rtt[slot])))
        devices = [d for d in self.topology.devices if d.id not in gone]
        if self.background is not None:
            free = dict(zip(ids, self.free_share[slot], strict=True))
            devices = [
                replace(
                    d.slowed(free[d.id]), memory_bytes=d.memory_bytes * (free[d.id] if self.background_memory else 1.0)
                )
                for d in devices
            ]
        return replace(self.topology, devices=tuple(devices), links=tuple(links))

    @cached_property
    def average(self) -> Topology:
        """The topology with the mean rates of the run, for planners that decide once."""
        links = []
        for link in self.topology.links:
            rate, rtt = (of.get((link.source, link.target)) for of in (self.bandwidth_bytes_per_s, self.rtt_s))
            if rate is not None:
                link = replace(link, bandwidth_bytes_per_s=max(1.0, float(rate.mean())))
            links.append(link if rtt is None else replace(link, rtt_s=float(rtt.mean())))
        return replace(self.topology, links=tuple(links))


def edge_cloud_links(topology: Topology) -> list[tuple[DeviceId, DeviceId]]:
    """The directed links between the two tiers, which a bandwidth trace drives."""
    tier = {d.id: d.tier for d in topology.devices}
    return [(x.source, x.target) for x in topology.links if tier[x.source] != tier[x.target]]


def background_load(num_slots: int, num_devices: int, *, most: float = 0.3, rng: np.random.Generator) -> Floats:
    """Uniform shares from 0 to `most` for every slot and device, [T, D] (docs/equations.md E4.C: 0 to 0.3)."""
    return rng.uniform(0.0, most, (num_slots, num_devices))


def random_cluster(rng: np.random.Generator, num_devices: int, memory_bytes: tuple[float, float]) -> Topology:
    """Log-normal devices of 5-50 GFLOPS, links of 1-10 Gbit/s (E4.C); the first one holds both ends."""
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"),
            tier="edge",
            memory_bytes=float(rng.uniform(*memory_bytes)) + 8e6 * (i == 0),
            compute_flops=float(np.clip(rng.lognormal(np.log(16e9), 0.7), 5e9, 50e9)),
            memory_bandwidth_bytes_per_s=float(rng.uniform(4e9, 40e9)),
        )
        for i in range(num_devices)
    )
    links = tuple(
        Link(source=a, target=b, bandwidth_bytes_per_s=rng.uniform(1e9, 1e10) / 8, rtt_s=rng.uniform(1e-5, 2e-4))
        for a, b in permutations((d.id for d in devices), 2)
    )
    return Topology(devices=devices, links=links, origin=devices[0].id, origin_holds="embedding_and_head")


def _wrong(what: str, expected: str, actual: object) -> InputError:
    return InputError(f"scenario {what}", expected=expected, actual=actual, remedy="correct the scenario")
