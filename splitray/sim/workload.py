"""Requests: when they arrive, how long their prompts are and how many tokens they ask for."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.errors import InputError, did_you_mean
from splitray.sim.table_rows import DECIMAL, reader_of, table_rows
from splitray.user_file import UserFile


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests in order of arrival, [R]."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    def __len__(self) -> int:
        return len(self.arrival_s)

    def before(self, end_s: float) -> Requests:
        """Those that arrive before a time."""
        keep = self.arrival_s < end_s
        return Requests(self.arrival_s[keep], self.prompt_tokens[keep], self.output_tokens[keep])

    def take(self, rows: Ints) -> Requests:
        """Some of them, in order."""
        return Requests(self.arrival_s[rows], self.prompt_tokens[rows], self.output_tokens[rows])

    def within(self, window_tokens: int) -> Requests:
        """All of them, each cut to a model's window."""
        prompt = np.minimum(self.prompt_tokens, max(1, window_tokens - 1))
        output = np.minimum(self.output_tokens, np.maximum(1, window_tokens - prompt))
        return Requests(self.arrival_s, prompt, output)


def poisson(
    rate_per_s: float,
    until_s: float,
    *,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rng: np.random.Generator,
) -> Requests:
    """Exponential gaps; lengths geometric with these means, at least 1."""
    many = int(rate_per_s * until_s + 10 * np.sqrt(rate_per_s * until_s) + 20)
    times = np.cumsum(rng.exponential(1 / rate_per_s, many)) if rate_per_s > 0 else np.zeros(0)
    return _with_lengths(times[times < until_s], prompt_tokens, output_tokens, rng)


def dealt(
    recorded: Requests, users: int, rate_per_s: float, until_s: float, rng: np.random.Generator
) -> tuple[Requests, ...]:
    """Recorded requests dealt at random to users: their order, lengths and bunching, at another mean rate.

    They are played again from the beginning where they end; `rate_per_s` is that of all users together. `rng` draws the
    first request, and who gets which.

    Raises:
        InputError: they have no rate, as all of them arrive at one time.
    """
    if recorded.arrival_s[-1] <= recorded.arrival_s[0]:
        raise InputError("recorded requests", expected="some that arrive at different times",
                         actual=f"{len(recorded)} at one time", remedy="give more of the recording")  # fmt: skip
    count = len(recorded)
    gaps = np.diff(recorded.arrival_s, append=recorded.arrival_s[-1] + np.diff(recorded.arrival_s).mean())
    many = int(2 * rate_per_s * until_s) + 20
    order = (rng.integers(count) + np.arange(many)) % count
    times = np.concatenate([[0.0], np.cumsum(gaps[order])[:-1]]) / (gaps.mean() * rate_per_s)
    order, times = order[times < until_s], times[times < until_s]
    whose = rng.integers(users, size=len(times))
    return tuple(
        Requests(
            times[whose == u], recorded.prompt_tokens[order[whose == u]], recorded.output_tokens[order[whose == u]]
        )
        for u in range(users)
    )


def bursty(
    rate_per_s: float,
    until_s: float,
    *,
    burst: float = 5.0,
    mean_burst_s: float = 10.0,
    mean_calm_s: float = 40.0,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rng: np.random.Generator,
) -> Requests:
    """A Poisson process of two rates that take turns; `burst` is their ratio, the mean rate stays."""
    calm = rate_per_s * (mean_burst_s + mean_calm_s) / (burst * mean_burst_s + mean_calm_s)
    now, in_burst, times = 0.0, False, []
    while now < until_s:
        stay = rng.exponential(mean_burst_s if in_burst else mean_calm_s)
        rate = calm * burst if in_burst else calm
        times.append(now + np.sort(rng.random(rng.poisson(rate * stay))) * stay)
        now, in_burst = now + stay, not in_burst
    joined = np.concatenate(times)
    return _with_lengths(joined[joined < until_s], prompt_tokens, output_tokens, rng)


def _with_lengths(times: Floats, prompt: int, output: int, rng: np.random.Generator) -> Requests:
    prompts, outputs = (rng.geometric(1 / max(1, n), len(times)) for n in (prompt, output))
    return Requests(times, prompts, outputs)


@dataclass(frozen=True, slots=True)
class _Format:
    """A kind of file: its columns (or keys) for time, prompt and answer, and what a time is in seconds, None if none.

    Times are told from the first row on, but where they begin at 0. Failed requests have no tokens.
    """

    columns: tuple[str, str, str]
    seconds: Callable[[str], float | None]
    told: str
    from_zero: bool = False
    may_fail: bool = False


def _decimal(text: str) -> float | None:
    return float(text) if _DECIMAL.fullmatch(text) else None


def _milliseconds(text: str) -> float | None:
    number = _decimal(text)
    return None if number is None else number / 1000


def _iso(text: str) -> float | None:
    """Without a zone it is UTC, whatever this machine's is."""
    try:
        at = datetime.fromisoformat(text) if _DATE.match(text) else None
        return None if at is None else (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


_FORMATS = {
    "": _Format(("arrival_s", "prompt_tokens", "output_tokens"), _decimal, "seconds from the start", from_zero=True),
    "azure": _Format(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _iso, "a date and time"),
    "burstgpt": _Format(("Timestamp", "Request tokens", "Response tokens"), _decimal, "seconds", may_fail=True),
    "mooncake": _Format(("timestamp", "input_length", "output_length"), _milliseconds, "milliseconds"),
}
_DECIMAL = re.compile(DECIMAL)
_WHOLE = re.compile("[0-9]{1,18}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}")
_MOST_S, _MOST_AT_S, _MOST_TOKENS = 1e9, 1e11, 10**9


def read_requests(spec: str) -> Requests:
    """Read `FILE` with the columns arrival_s, prompt_tokens, output_tokens, or `READER:FILE`.

    Readers: `azure` (AzureLLMInferenceTrace, CSV with dates), `burstgpt` (CSV, seconds; failed requests are left out)
    and `mooncake` (a JSON object a line, milliseconds). Columns may come in any order and case, with others beside
    them. How they and comments are told is in `table_rows`; files may be packed by gzip.

    Raises:
        InputError: the file or a row cannot be read, a value is out of range, or time goes back.
    """
    name, path = reader_of(spec)
    if name not in _FORMATS:
        known = [f"{n}:FILE" for n in _FORMATS if n]
        raise InputError(f"arrivals {spec}", expected=f"FILE, {', '.join(known)}, poisson[:PER_S] or bursty[:PER_S]",
                         actual=name, remedy=f"name the reader{did_you_mean(name, _FORMATS)}")  # fmt: skip
    file, format = UserFile(path, "arrivals", "correct the file"), _FORMATS[name]
    times, prompts, outputs = array("d"), array("q"), array("q")
    for line, cells in (_objects if name == "mooncake" else _table)(file, name):
        at = format.seconds(cells[0])
        if at is None or not abs(at) <= _MOST_AT_S or (format.from_zero and not 0 <= at <= _MOST_S):
            raise file.wrong(f"{format.columns[0]}, {format.told}", repr(cells[0]), line=line)
        prompt = _tokens(file, line, format, 1, cells)
        output = _tokens(file, line, format, 2, cells)
        if not prompt or not output:
            continue
        if times and at < times[-1]:
            raise file.wrong("a time no earlier than the row before", repr(cells[0]), line=line)
        times.append(at)
        prompts.append(prompt)
        outputs.append(output)
    if not times:
        raise file.wrong(f"rows with {', '.join(format.columns)}", "none")
    first = 0.0 if format.from_zero else times[0]
    return Requests(np.array(times) - first, np.array(prompts, np.int64), np.array(outputs, np.int64))


def _tokens(file: UserFile, line: int, format: _Format, at: int, cells: list[str]) -> int:
    count = int(cells[at]) if _WHOLE.fullmatch(cells[at]) else -1
    least = 0 if format.may_fail else 1
    if not least <= count <= _MOST_TOKENS:
        expected = f"{format.columns[at]}, a whole number from {least} to {_MOST_TOKENS:,}"
        raise file.wrong(expected, repr(cells[at]), line=line)
    return count


def _table(file: UserFile, name: str) -> Iterator[tuple[int, list[str]]]:
    """The three cells of each row of a CSV file, found by its header."""
    rows, columns = table_rows(file, headed=True), _FORMATS[name].columns
    header = next(rows, None)
    if header is None:
        raise file.wrong(f"a header with {', '.join(columns)}", "no rows")
    titles = [t.casefold() for t in header.cells]
    if any(titles.count(c.casefold()) != 1 for c in columns):
        fits = [n for n, f in _FORMATS.items() if all(c.casefold() in titles for c in f.columns)]
        fits += ["mooncake"] * header.cells[0].startswith("{")
        remedy = f"write {fits[0]}:{file.path}" if fits and fits[0] else None
        raise file.wrong(f"rows with the columns {', '.join(columns)}", header.cells, line=header.line, remedy=remedy)
    at = [titles.index(c.casefold()) for c in columns]
    for row in rows:
        if len(row.cells) != len(titles):
            raise file.wrong(f"{len(titles)} columns, as in the header", row.cells, line=row.line)
        yield row.line, [row.pointed(row.cells[at[0]]), *(row.cells[i] for i in at[1:])]


def _objects(file: UserFile, name: str) -> Iterator[tuple[int, list[str]]]:
    """The three values of each line's JSON object."""
    columns = _FORMATS[name].columns
    for line, text in file.lines():
        if not text.strip():
            continue
        values = file.parsed(text, line)
        if not isinstance(values, dict) or not all(type(values.get(c)) in (int, float) for c in columns):
            raise file.wrong(f"an object with the numbers {', '.join(columns)}", f"{text:.200}", line=line)
        yield line, [str(values[c]) for c in columns]
