"""From what a user writes to arrays over slots: a model of a link's rate or round trip, or a trace file; arrivals."""

from collections.abc import Sequence

import numpy as np

from splitray.arrays import Floats
from splitray.errors import InputError
from splitray.sim.traces import gilbert_elliott, log_ar1, read_trace
from splitray.sim.workload import Requests, bursty, poisson, read_requests
from splitray.topology import DeviceId, Topology

_AR1, _OUTAGES = "log_ar1", "gilbert_elliott"
TRACE_USAGE = f"FILE, READER:FILE, {_AR1}[:SIGMA], {_OUTAGES}, or {_AR1}[:SIGMA]+{_OUTAGES}"
ARRIVAL_USAGE = "FILE, azure:FILE, burstgpt:FILE, mooncake:FILE, poisson[:PER_S] or bursty[:PER_S]"


def varied(
    spec: str,
    base: float,
    num_slots: int,
    slot_s: float,
    rng: np.random.Generator,
    *,
    what: str,
    repeat: bool = False,
) -> Floats:
    """The values of one link over the slots, [T].

    `spec` is written as `TRACE_USAGE` says: models vary around `base`, the link's own rate in byte/s or round trip in
    s, and a file replaces it. `what` is `bandwidth` or `rtt`; a round trip has no outages. `repeat`: play a file again
    where it ends, and do not hold its last value.

    Raises:
        InputError: the file cannot be used, or a parameter is wrong.
    """
    parts = spec.split("+")
    if not all(p.partition(":")[0] in (_AR1, _OUTAGES) for p in parts):
        trace = read_trace(spec, quantity=what)
        return (trace.repeated(num_slots * slot_s) if repeat else trace).sampled(num_slots, slot_s)
    values = np.full(num_slots, float(base))
    for part in parts:
        name, _, argument = part.partition(":")
        if name == _OUTAGES:
            if argument or what != "bandwidth":
                raise _wrong(spec, f"{_OUTAGES} without an argument, for a bandwidth", part)
            values = values * gilbert_elliott(num_slots, slot_s, rng=rng)
            continue
        sigma = _number(spec, argument, 0.4)
        values = values * log_ar1(num_slots, slot_s, mean=1.0, sigma_log=sigma, rng=rng)
    return values


def links_varied(
    spec: str | None,
    topology: Topology,
    pairs: list[tuple[DeviceId, DeviceId]],
    num_slots: int,
    slot_s: float,
    rng: np.random.Generator,
    *,
    what: str,
    repeat: bool = False,
) -> dict[tuple[DeviceId, DeviceId], Floats]:
    """The same spec for several links; both ways of a pair of devices change together."""
    if spec is None:
        return {}
    found: dict[tuple[DeviceId, DeviceId], Floats] = {}
    for a, b in pairs:
        link = topology.link(a, b)
        assert link is not None, "pairs are links of the topology"
        base = link.bandwidth_bytes_per_s if what == "bandwidth" else link.rtt_s
        other, back = found.get((b, a)), topology.link(b, a)
        if other is not None and back is not None:
            there = back.bandwidth_bytes_per_s if what == "bandwidth" else back.rtt_s
            modelled = spec.partition(":")[0].partition("+")[0] in (_AR1, _OUTAGES)
            found[a, b] = other * (base / there) if modelled and there else other
        else:
            found[a, b] = varied(spec, base, num_slots, slot_s, rng, what=what, repeat=repeat)
    return found


def arrivals(spec: str | None, until_s: float, rate_per_s: float, rng: np.random.Generator) -> Requests:
    """Requests before a time.

    `spec` is written as `ARRIVAL_USAGE` says, None is `poisson`; `rate_per_s` is that of `poisson` and `bursty` without
    a rate of their own.

    Raises:
        InputError: the file cannot be used, or the rate is no number above 0.
    """
    name, _, argument = (spec or "poisson").partition(":")
    if name not in ("poisson", "bursty"):
        return read_requests(spec or "").before(until_s)
    rate = _number(spec or "", argument, rate_per_s)
    return (poisson if name == "poisson" else bursty)(rate, until_s, rng=rng)


def requests_of(
    spec: str | None, until_s: float, rate_per_s: float, rngs: Sequence[np.random.Generator]
) -> tuple[Requests, ...]:
    """The requests of several users, each with a generator: `arrivals` of each, or those of a file dealt at random.

    Raises:
        InputError: as `arrivals`.
    """
    if (spec or "poisson").partition(":")[0] in ("poisson", "bursty") or len(rngs) == 1:
        return tuple(arrivals(spec, until_s, rate_per_s, rng) for rng in rngs)
    line = arrivals(spec, until_s, rate_per_s, rngs[0])
    whose = rngs[0].integers(len(rngs), size=len(line))
    return tuple(line.take(np.flatnonzero(whose == k)) for k in range(len(rngs)))


def _number(spec: str, text: str, default: float) -> float:
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise _wrong(spec, "a number above 0 after the colon", repr(text))
    return value


def _wrong(spec: str, expected: str, actual: object) -> InputError:
    return InputError(spec, expected=expected, actual=actual, remedy=f"write {TRACE_USAGE}, or {ARRIVAL_USAGE}")
