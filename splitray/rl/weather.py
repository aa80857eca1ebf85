"""What happens to the instances of a cell while they run: bandwidth, round trips, other users of the cloud, requests.

Everything is drawn from one generator, so that a seed reproduces it. Shapes: N instances, T slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from splitray.planners.protocol import RequestShape
from splitray.rl.cell import USUAL, References
from splitray.sim.traces import gilbert_elliott, log_ar1
from splitray.sim.workload import Requests, bursty, poisson
from splitray.topology import Topology

Floats = NDArray[np.float64]
MOST_TAKEN = 0.95  # of the cloud, by others
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Climate:
    """What weather is drawn from.

    Args:
        cloud_load: mean share of the cloud that all users take under cloud_only, this one included.
        users: how many share the cloud; each offers cloud_load / users of what the cloud alone serves.
        bandwidth_sigma: of the logarithm of the link's rate (log_ar1).
        outages: the link also fails for seconds (gilbert_elliott).
        rtt_sigma: of the logarithm of the round trip.
        cloud_sigma: of the logit of the share that others take; `cloud_rho` is its correlation from slot to slot.
        arrivals: the process.
        request: mean lengths.
        power_w: mean power that the virtual energy queue holds all devices to.
    """

    cloud_load: float = 0.8
    users: int = 4
    bandwidth_sigma: float = 0.4
    outages: bool = False
    rtt_sigma: float = 0.0
    cloud_sigma: float = 0.8
    cloud_rho: float = 0.9
    arrivals: Literal["poisson", "bursty"] = "poisson"
    request: RequestShape = USUAL
    power_w: float = float("inf")

    @property
    def own_load(self) -> float:
        """The share of what cloud_only serves on an idle cloud that this user asks for."""
        return self.cloud_load / self.users

    @property
    def others_load(self) -> float:
        """Mean share of the cloud that the others take."""
        return self.cloud_load - self.own_load


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """Drawn, recorded or made up: rates in byte/s (0 is an outage), round trips in s, shares of the cloud, [N, T]."""

    link_bytes_per_s: Floats
    rtt_s: Floats
    cloud_taken: Floats
    requests: tuple[Requests, ...]  # N

    @property
    def num_instances(self) -> int:
        """N."""
        return len(self.link_bytes_per_s)

    @property
    def num_slots(self) -> int:
        """T."""
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

    Args:
        climate: what to draw from.
        topology: of two devices.
        known: for the rate that cloud_only serves.
        window_tokens: requests are cut to it.
        num_instances: N.
        num_slots: T.
        slot_s: length of a slot.
        rng: of everything.
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
    per_s = climate.own_load / known.service_s
    process = poisson if climate.arrivals == "poisson" else bursty
    requests = tuple(
        _cut(
            process(
                per_s, num_slots * slot_s, rng=rng,
                prompt_tokens=round(climate.request.prompt_tokens), output_tokens=round(climate.request.output_tokens),
            ),
            window_tokens,
        )
        for _ in range(num_instances)
    )  # fmt: skip
    return Weather(link_bytes_per_s=rate, rtt_s=rtt, cloud_taken=_taken(climate, shape, rng), requests=requests)


def copied(weather: Weather, copies: int) -> Weather:
    """Each instance's weather so many times in a row."""
    return Weather(
        link_bytes_per_s=np.repeat(weather.link_bytes_per_s, copies, axis=0),
        rtt_s=np.repeat(weather.rtt_s, copies, axis=0),
        cloud_taken=np.repeat(weather.cloud_taken, copies, axis=0),
        requests=tuple(r for r in weather.requests for _ in range(copies)),
    )


def _taken(climate: Climate, shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """An AR(1) process in logit space with the wanted mean share, [N, T]."""
    mean = climate.others_load
    if mean <= 0:
        return np.zeros(shape)
    sigma, rho = climate.cloud_sigma, climate.cloud_rho
    x = np.empty(shape)
    x[:, 0] = rng.normal(0.0, sigma, shape[0])
    noise = rng.normal(0.0, sigma * np.sqrt(1 - rho * rho), shape)
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    low, high = -20.0, 20.0  # bisection: the mean of a squashed normal is monotone in its offset
    for _ in range(40):
        middle = (low + high) / 2
        got = (_WEIGHTS * _squash(middle + sigma * _NODES)).sum() / _WEIGHTS.sum()
        low, high = (middle, high) if got < mean else (low, middle)
    return np.minimum(_squash(low + x), MOST_TAKEN)


def _squash(x: Floats) -> Floats:
    squashed: Floats = 1 / (1 + np.exp(-x))
    return squashed


def _cut(line: Requests, window: int) -> Requests:
    """Requests that fit the model's window, as `sim/scenario.py` cuts them."""
    prompt = np.minimum(line.prompt_tokens, max(1, window - 1))
    return Requests(line.arrival_s, prompt, np.minimum(line.output_tokens, np.maximum(1, window - prompt)))
