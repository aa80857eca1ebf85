"""How bandwidth and round-trip time change: read from files that state their units, or drawn from models.

A trace is a step function: each value holds until the next time, the last one for ever. Zero bandwidth is an outage.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitray.arrays import Bools, Floats
from splitray.errors import InputError, did_you_mean

PACKET_BYTES = 1504  # of the one-integer-a-packet format (Mahimahi)
_MOST_MS = 10_000_000  # that a trace of packets may span
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}  # in either case
_RATES = {  # b is bits and B is bytes, eight times as much
    written + unit: size * factor
    for prefix, factor in _PREFIXES.items()
    for written in {prefix, prefix.upper()}
    for unit, size in {"bit/s": 1 / 8, "Bit/s": 1 / 8, "b/s": 1 / 8, "bps": 1 / 8, "B/s": 1.0, "Bps": 1.0}.items()
}
_TIMES = {written: s for unit, s in {"us": 1e-6, "ms": 1e-3, "s": 1.0}.items() for written in (unit, unit.upper())}
_RATE_USAGE = "bit/s, b/s, bps (bits), B/s, Bps (bytes), with k, M or G before it"
_TIME_USAGE = "us, ms, s"
_QUANTITY = re.compile(r"^([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?nan|[-+]?inf)\s*([A-Za-z/]*)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trace:
    """Values in SI units (byte/s or s) from their times on, [T]; the first time is 0."""

    time_s: Floats
    value: Floats

    def repeated(self, until_s: float) -> Trace:
        """The trace again and again until a time; its last value holds as long as its values do on average."""
        period = float(self.time_s[-1]) + (
            float(self.time_s[-1]) / (len(self.time_s) - 1) if len(self.time_s) > 1 else 1
        )
        times = max(1, int(np.ceil(until_s / period)))
        starts = np.repeat(np.arange(times) * period, len(self.time_s))
        return Trace(np.tile(self.time_s, times) + starts, np.tile(self.value, times))

    def sampled(self, num_slots: int, slot_s: float) -> Floats:
        """The mean over each slot, [num_slots]."""
        edges = np.arange(num_slots + 1) * slot_s
        widths = np.diff(self.time_s)
        area = np.concatenate([[0.0], np.cumsum(self.value[:-1] * widths)])
        at = np.clip(np.searchsorted(self.time_s, edges, side="right") - 1, 0, None)
        total = area[at] + self.value[at] * (edges - self.time_s[at])
        return np.maximum(0.0, np.diff(total) / slot_s)


def read_trace(spec: str, *, quantity: str = "bandwidth") -> Trace:
    """Read `FILE`, or `READER:FILE` for a format other than time [s] and Mbit/s (for a round trip: time [s] and ms).

    Readers: `columns` (the default; a value may carry its unit, so that kbit/s and Mbit/s may stand in one column),
    `with_ping` (time [s], Mbit/s, ping [ms] in one row) and `packets` (one integer millisecond for each delivered
    packet of 1,504 bytes).

    Raises:
        InputError: the file cannot be read, a unit is not known, a value is negative or not a number, time goes back.
    """
    name, colon, rest = spec.partition(":")
    if colon and name.isidentifier() and not Path(spec).exists():
        if name not in _READERS:
            raise InputError(
                f"trace {spec}",
                expected=f"a reader among {sorted(_READERS)}",
                actual=name,
                remedy=f"write READER:FILE{did_you_mean(name, _READERS)}, or just FILE",
            )
    else:
        name, rest = "columns", spec
    try:
        lines = Path(rest).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(rest, "a readable text file", error, "give the path of a trace") from error
    rows = [(i, line.split("#")[0].replace(",", " ").split()) for i, line in enumerate(lines, 1)]
    time_s, value = _READERS[name](rest, [(i, r) for i, r in rows if r], quantity)
    if not time_s:
        raise _wrong(rest, "at least one row", "none", "give a trace with rows")
    return Trace(np.array(time_s) - time_s[0], np.array(value))


def _columns(path: str, rows: list[tuple[int, list[str]]], quantity: str) -> tuple[list[float], list[float]]:
    time_s: list[float] = []
    value: list[float] = []
    for line, row in rows:
        if len(row) == 3 and not _QUANTITY.match(row[2]):
            row = [row[0], row[1] + row[2]]  # the unit may stand apart
        if len(row) != 2:
            raise _wrong(f"{path}:{line}", "two columns, time [s] and a value", row, "see SOURCE of the trace")
        time_s.append(_time(path, line, row[0], time_s))
        units, default = (_RATES, 125e3) if quantity == "bandwidth" else (_TIMES, 1e-3)
        value.append(_value(path, line, row[1], units, default))
    return time_s, value


def _with_ping(path: str, rows: list[tuple[int, list[str]]], quantity: str) -> tuple[list[float], list[float]]:
    time_s: list[float] = []
    value: list[float] = []
    for line, row in rows:
        if len(row) != 3:
            raise _wrong(f"{path}:{line}", "three columns: time [s], Mbit/s, ping [ms]", row, "choose another reader")
        time_s.append(_time(path, line, row[0], time_s))
        rate = _value(path, line, row[1], _RATES, 125e3)
        ping = _value(path, line, row[2], _TIMES, 1e-3)
        value.append(rate if quantity == "bandwidth" else ping)
    return time_s, value


def _packets(path: str, rows: list[tuple[int, list[str]]], quantity: str) -> tuple[list[float], list[float]]:
    if quantity != "bandwidth":
        raise _wrong(path, "round-trip times", "a trace of packets", "use the reader columns or with_ping")
    times: list[int] = []
    for line, row in rows:
        if len(row) != 1 or not row[0].isdecimal() or len(row[0]) > 18:
            raise _wrong(f"{path}:{line}", "one integer, the millisecond of a packet", row, "choose another reader")
        if times and int(row[0]) < times[-1]:
            raise _wrong(f"{path}:{line}", f"a time of at least {times[-1]} ms", row[0], "put the rows in order")
        times.append(int(row[0]))
        if times[-1] - times[0] > _MOST_MS:
            raise _wrong(
                f"{path}:{line}",
                f"at most {_MOST_MS:,} ms from the first packet, at {times[0]} ms, to the last",
                f"{times[-1] - times[0]:,} ms",
                "cut the trace, and write milliseconds",
            )
    if not times:
        return [], []
    counts = np.bincount((np.array(times) - times[0]) // 1000)  # of each second since the first packet
    return [float(i) for i in range(len(counts))], [float(c * PACKET_BYTES) for c in counts]


_READERS: dict[str, Callable[[str, list[tuple[int, list[str]]], str], tuple[list[float], list[float]]]] = {
    "columns": _columns,
    "with_ping": _with_ping,
    "packets": _packets,
}


def _number(path: str, line: int, text: str, units: dict[str, float], default: float) -> float:
    found = _QUANTITY.match(text)
    if not found:
        raise _wrong(f"{path}:{line}", "a number, with or without a unit", repr(text), "correct the row")
    number, unit = found.groups()
    if unit and unit not in units:
        usage = _RATE_USAGE if units is _RATES else _TIME_USAGE
        raise _wrong(f"{path}:{line}", f"a unit among {usage}", repr(unit), "convert the column")
    return float(number) * (units[unit] if unit else default)


def _value(path: str, line: int, text: str, units: dict[str, float], default: float) -> float:
    value = _number(path, line, text, units, default)
    if not 0 <= value < float("inf"):
        raise _wrong(f"{path}:{line}", "a finite value of 0 or more", text, "remove or correct the row")
    return value


def _time(path: str, line: int, text: str, before: list[float]) -> float:
    at = _number(path, line, text, _TIMES, 1.0)
    if not np.isfinite(at):
        raise _wrong(f"{path}:{line}", "a finite time", text, "remove or correct the row")
    if before and at < before[-1]:
        raise _wrong(f"{path}:{line}", f"a time of {before[-1]} s or later", text, "put them in order")
    return at


def _wrong(what: str, expected: str, actual: object, remedy: str) -> InputError:
    return InputError(f"trace {what}", expected=expected, actual=actual, remedy=remedy)


def log_ar1(
    num_slots: int,
    slot_s: float,
    *,
    mean: float,
    sigma_log: float = 0.4,
    rho_per_100ms: float = 0.95,
    rng: np.random.Generator,
) -> Floats:
    """A log-normal AR(1) process with this mean, [num_slots] (docs/equations.md E6.2)."""
    rho = rho_per_100ms ** (slot_s / 0.1)
    noise = rng.normal(0.0, sigma_log * np.sqrt(1 - rho * rho), num_slots)
    x = rng.normal(0.0, sigma_log)
    found = np.empty(num_slots)
    for i, step in enumerate(noise):
        found[i] = x
        x = rho * x + step
    return mean * np.exp(found - sigma_log**2 / 2)


def gilbert_elliott(
    num_slots: int, slot_s: float, *, outage_per_s: float = 1 / 60, mean_outage_s: float = 2.0, rng: np.random.Generator
) -> Bools:
    """Whether the link is up in each slot, [num_slots]: two states, exponential stays (docs/equations.md E6.2)."""
    leave_up, leave_down = 1 - np.exp(-slot_s * outage_per_s), 1 - np.exp(-slot_s / mean_outage_s)
    draws = rng.random(num_slots)
    up = rng.random() < leave_down / (leave_up + leave_down)
    found = np.empty(num_slots, bool)
    for i, draw in enumerate(draws):
        found[i] = up
        up = not (draw < leave_up) if up else draw < leave_down
    return found
