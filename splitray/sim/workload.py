"""Requests: when they arrive, how long their prompts are and how many tokens they ask for."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.errors import InputError

_AZURE = "TIMESTAMP", "ContextTokens", "GeneratedTokens"


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

    There are at least two recorded ones, played again from the beginning where they end; `rate_per_s` is that of all
    users together. `rng` draws the first request, and who gets which.
    """
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


def read_requests(spec: str) -> Requests:
    """Read `FILE` with the columns arrival_s, prompt_tokens, output_tokens, or `azure:FILE` (AzureLLMInferenceTrace).

    Raises:
        InputError: the file or a row cannot be read, a value is out of range, or time goes back.
    """
    azure = spec.startswith("azure:") and not Path(spec).exists()
    path = spec.removeprefix("azure:") if azure else spec
    names = _AZURE if azure else ("arrival_s", "prompt_tokens", "output_tokens")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _wrong(path, "a readable CSV file", error) from error
    if not rows or set(names) - set(rows[0]):
        remedy = f"write azure:{path}" if rows and not set(_AZURE) - set(rows[0]) else "correct the file"
        raise _wrong(path, f"rows with the columns {', '.join(names)}", sorted(rows[0]) if rows else "no rows", remedy)
    times, prompts, outputs = [], [], []
    for i, row in enumerate(rows, 2):
        try:
            text = row[names[0]]
            times.append(datetime.fromisoformat(text[:26]).timestamp() if azure else float(text))
            prompts.append(int(row[names[1]]))
            outputs.append(int(row[names[2]]))
        except (TypeError, ValueError) as error:
            raise _wrong(f"{path}:{i}", "a time and two whole numbers", list(row.values())) from error
        if not (np.isfinite(times[-1]) and prompts[-1] >= 1 and outputs[-1] >= 1):
            raise _wrong(f"{path}:{i}", "a time, and at least one token each", list(row.values()))
        if len(times) > 1 and times[-1] < times[-2]:
            raise _wrong(f"{path}:{i}", "a time no earlier than the row before", text)
    first = times[0] if azure else 0.0
    if times[0] < first:
        raise _wrong(path, "times of 0 or more", times[0])
    return Requests(np.array(times) - first, np.array(prompts), np.array(outputs))


def _wrong(what: str, expected: str, actual: object, remedy: str = "correct the file") -> InputError:
    return InputError(f"arrivals {what}", expected=expected, actual=actual, remedy=remedy)
