"""What happens to the instances of a cell while they run: bandwidth, round trips, requests, and who shares a cloud.

An instance is one edge device with its own link and its own requests; so many of them share one cloud, whose load comes
from what they do. Everything is drawn from one generator, so that a seed reproduces it. Shapes: N instances, T slots.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.planners.protocol import RequestShape
from splitray.rl.world.cell import USUAL, References
from splitray.sim.traces import gilbert_elliott, log_ar1
from splitray.sim.workload import Requests, bursty, poisson
from splitray.topology import Topology

USERS = (16, 32, 64)  # of one cloud
_OWN_MOST = 0.6  # of a line's time, at a load of _HEAVY under cloud_only and an idle cloud
_HEAVY = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Climate:
    """What weather is drawn from.

    Args:
        cloud_load: of the cloud, if all its users served all requests by cloud_only.
        users: how many share it (`users_of`, if None); each asks for cloud_load / users of what the cloud can do.
        bandwidth_sigma: of the logarithm of the link's rate (log_ar1).
        outages: the link also fails for seconds (gilbert_elliott).
        rtt_sigma: of the logarithm of the round trip.
        arrivals: the process.
        request: mean lengths.
        power_w: mean power that the virtual energy queue holds all devices to.
    """

    cloud_load: float = 0.8
    users: int | None = None
    bandwidth_sigma: float = 0.4
    outages: bool = False
    rtt_sigma: float = 0.0
    arrivals: Literal["poisson", "bursty"] = "poisson"
    request: RequestShape = USUAL
    power_w: float = float("inf")

    def rate_per_s(self, known: References) -> float:
        """Requests a second of one user."""
        return self.cloud_load / (self.users or users_of(known)) / known.cloud.device_s(self.request)


def users_of(known: References) -> int:
    """How many edges share a cloud: so many that it, and not their own round trips, is what holds them up.

    A line serves one request at a time. Where ends are pinned and a token takes a round trip, few users could not load
    a cloud by 95 %, whatever they do.
    """
    line_s = _HEAVY * known.cloud.service_s(known.request) / known.cloud.device_s(known.request)
    return next((n for n in USERS if line_s / n <= _OWN_MOST), USERS[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """Drawn, recorded or made up: rates in byte/s (0 is an outage) and round trips in s, [N, T]."""

    link_bytes_per_s: Floats
    rtt_s: Floats
    requests: tuple[Requests, ...]  # N
    pool: Ints  # [N], instances of one number share a cloud

    @property
    def num_instances(self) -> int:
        """N, the number of instances."""
        return len(self.link_bytes_per_s)

    @property
    def num_slots(self) -> int:
        """T, the number of slots."""
        return self.link_bytes_per_s.shape[1]


def draw(
    climate: Climate,
    topology: Topology,
    known: References,
    *,
    window_tokens: int,
    num_instances: int,
    num_slots: int,
    slot_s: float,
    rng: np.random.Generator,
) -> Weather:
    """Weather around a topology's own rates.

    Requests are cut to `window_tokens`, and so many of the N instances share a cloud as the climate says. The rate that
    cloud_only serves comes from `known`.
    """
    edge, cloud = topology.ids
    link = topology.link(edge, cloud)
    assert link is not None, "a cell's devices are linked"
    shape = num_instances, num_slots
    rate = np.full(shape, link.bandwidth_bytes_per_s)
    rtt = np.full(shape, link.rtt_s)
    for i in range(num_instances):
        if climate.bandwidth_sigma:
            rate[i] *= log_ar1(num_slots, slot_s, mean=1.0, sigma_log=climate.bandwidth_sigma, rng=rng)
        if climate.outages:
            rate[i] *= gilbert_elliott(num_slots, slot_s, rng=rng)
        if climate.rtt_sigma:
            rtt[i] *= log_ar1(num_slots, slot_s, mean=1.0, sigma_log=climate.rtt_sigma, rng=rng)
    per_s = climate.rate_per_s(known)
    process = poisson if climate.arrivals == "poisson" else bursty
    requests = tuple(
        process(
            per_s, num_slots * slot_s, rng=rng,
            prompt_tokens=round(climate.request.prompt_tokens), output_tokens=round(climate.request.output_tokens),
        ).within(window_tokens)
        for _ in range(num_instances)
    )  # fmt: skip
    pool = np.arange(num_instances) // (climate.users or users_of(known))
    return Weather(link_bytes_per_s=rate, rtt_s=rtt, requests=requests, pool=pool)


def copied(weather: Weather, copies: int) -> Weather:
    """The whole weather so many times, copy after copy."""
    clouds = int(weather.pool.max()) + 1
    return Weather(
        link_bytes_per_s=np.tile(weather.link_bytes_per_s, (copies, 1)),
        rtt_s=np.tile(weather.rtt_s, (copies, 1)),
        requests=weather.requests * copies,
        pool=np.concatenate([weather.pool + clouds * i for i in range(copies)]),
    )
