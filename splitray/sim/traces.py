"""How bandwidth and round-trip time change: read from files that state their units, or drawn from models.

A trace is a step function: each value holds until the next time, the last one for ever. Of rows at one time the last
counts. Zero bandwidth is an outage.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Bools, Floats
from splitray.errors import InputError, did_you_mean
from splitray.sim.table_rows import DECIMAL, TableRow, reader_of, table_rows
from splitray.user_file import UserFile

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
_QUANTITY = re.compile(rf"^({DECIMAL}|[-+]?nan|[-+]?inf)\s*([A-Za-z/]*)$", re.IGNORECASE)


_UNITS = {  # units, the default one, the least above 0 and the most that is believed, and what that is called
    "bandwidth": (_RATES, 125e3, 1e-9, 1e18, "1e18 byte/s"),
    "rtt": (_TIMES, 1e-3, 0.0, 1e5, "1e5 s"),
}
_INSTANT_S = 1e-6  # times that are no further apart are equal
_MOST_AT_S, _MOST_SPAN_S = 1e10, 1e7
_MOST_STEPS = 10_000_000
Columns = tuple[array, array]
"""Times in seconds and values in SI units."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Values in SI units (byte/s or s) from their times on, [T]; the first time is 0."""

    time_s: Floats
    value: Floats

    def repeated(self, until_s: float) -> Trace:
        """The trace again and again until a time; its last value holds as long as its values do on average.

        Raises:
            InputError: it would take more than `_MOST_STEPS`.
        """
        period = float(self.time_s[-1]) + (
            float(self.time_s[-1]) / (len(self.time_s) - 1) if len(self.time_s) > 1 else 1
        )
        times = max(1, int(np.ceil(until_s / period)))
        if times * len(self.time_s) > _MOST_STEPS:
            raise InputError(f"trace of {period:g} s", expected=f"at most {_MOST_STEPS:,} values in {until_s:g} s",
                             actual=f"{times * len(self.time_s):,}", remedy="give a longer one")  # fmt: skip
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
    packet of 1,504 bytes). How columns and comments are told is in `table_rows`; files may be packed by gzip.

    Raises:
        InputError: the file cannot be read, a unit is not known, a value is negative or not a number, time goes back.
    """
    name, path = reader_of(spec)
    if name and name not in _READERS:
        raise InputError(
            f"trace {spec}",
            expected=f"a reader among {sorted(_READERS)}",
            actual=name,
            remedy=f"write READER:FILE{did_you_mean(name, _READERS)}, or just FILE",
        )
    file = UserFile(path, "trace", "correct the row")
    time_s, value = _READERS[name or "columns"](table_rows(file), quantity)
    if not time_s:
        raise file.wrong("at least one row", "none", remedy="give a trace with rows")
    return Trace(np.array(time_s) - time_s[0], np.array(value))


def _columns(rows: Iterator[TableRow], quantity: str) -> Columns:
    found = array("d"), array("d")
    for row in rows:
        cells = row.cells
        if len(cells) == 3 and row.separator == " " and not _QUANTITY.match(cells[2]):
            cells = [cells[0], cells[1] + cells[2]]  # the unit may stand apart
        if len(cells) != 2:
            expected, remedy = "two columns, time [s] and a value", "see --help for the readers of other formats"
            raise row.file.wrong(expected, row.cells, line=row.line, remedy=remedy)
        _add(*found, _time(row, cells[0], found[0]), _value(row, cells[1], quantity))
    return found


def _with_ping(rows: Iterator[TableRow], quantity: str) -> Columns:
    found = array("d"), array("d")
    for row in rows:
        if len(row.cells) != 3:
            expected = "three columns: time [s], Mbit/s, ping [ms]"
            raise row.file.wrong(expected, row.cells, line=row.line, remedy="choose another reader")
        time_s = _time(row, row.cells[0], found[0])
        rate, ping = (_value(row, cell, what) for cell, what in zip(row.cells[1:], _UNITS, strict=True))
        _add(*found, time_s, rate if quantity == "bandwidth" else ping)
    return found


def _add(times: array[float], values: array[float], time_s: float, value: float) -> None:
    """The last of equal times counts: the others would hold for no time."""
    if times and time_s - times[-1] < _INSTANT_S:
        values[-1] = value
        return
    times.append(time_s)
    values.append(value)


def _packets(rows: Iterator[TableRow], quantity: str) -> Columns:
    first, last, counts = -1, -1, array("d")
    for row in rows:
        text = row.cells[0]
        if quantity != "bandwidth":
            remedy = "use the reader columns or with_ping"
            raise row.file.wrong("round-trip times", "a trace of packets", remedy=remedy)
        if len(row.cells) != 1 or not re.fullmatch("[0-9]{1,18}", text):
            expected = "one integer, the millisecond of a packet"
            raise row.file.wrong(expected, row.cells, line=row.line, remedy="choose another reader")
        first, before, last = int(text) if first < 0 else first, last, int(text)
        if last < before:
            raise row.file.wrong(f"a time of at least {before} ms", text, line=row.line, remedy="put the rows in order")
        if last - first > _MOST_MS:
            expected = f"at most {_MOST_MS:,} ms from the first packet, at {first} ms, to the last"
            remedy = "cut the trace, and write milliseconds"
            raise row.file.wrong(expected, f"{last - first:,} ms", line=row.line, remedy=remedy)
        while len(counts) <= (last - first) // 1000:  # seconds since the first packet
            counts.append(0.0)
        counts[-1] += PACKET_BYTES
    return array("d", range(len(counts))), counts


_READERS: dict[str, Callable[[Iterator[TableRow], str], Columns]] = {
    "columns": _columns,
    "with_ping": _with_ping,
    "packets": _packets,
}


def _number(row: TableRow, cell: str, units: dict[str, float], default: float) -> float:
    found = _QUANTITY.match(row.pointed(cell))
    if not found:
        expected, remedy = "a number, with or without a unit", "correct the row, or write # before what is no data"
        raise row.file.wrong(expected, repr(cell), line=row.line, remedy=remedy)
    number, unit = found.groups()
    if unit and unit not in units:
        usage = _RATE_USAGE if units is _RATES else _TIME_USAGE
        raise row.file.wrong(f"a unit among {usage}", repr(unit), line=row.line, remedy="convert the column")
    return float(number) * (units[unit] if unit else default)


def _value(row: TableRow, cell: str, quantity: str) -> float:
    units, default, least, most, shown = _UNITS[quantity]
    value = _number(row, cell, units, default)
    if not 0 <= value <= most or 0 < value < least:
        remedy = f"correct the row; the most that is believed is {shown}"
        raise row.file.wrong("a finite value of 0 or more", cell, line=row.line, remedy=remedy)
    return value


def _time(row: TableRow, cell: str, before: array[float]) -> float:
    at = _number(row, cell, _TIMES, 1.0)
    if not abs(at) <= _MOST_AT_S:
        remedy = "write seconds, or the unit: 1700000000000ms"
        raise row.file.wrong("a finite time, in seconds", cell, line=row.line, remedy=remedy)
    if before and at < before[-1]:
        raise row.file.wrong(f"a time of {before[-1]} s or later", cell, line=row.line, remedy="put them in order")
    if before and at - before[0] > _MOST_SPAN_S:
        expected = f"at most {_MOST_SPAN_S:,.0f} s from the first row, at {before[0]:g} s, to the last"
        raise row.file.wrong(expected, cell, line=row.line, remedy="cut the trace, and write seconds or the unit")
    return at


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
