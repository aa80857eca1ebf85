"""What one planner did to one scenario: raw samples, and the figures that are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.stats import linregress

from splitray.arrays import Bools, Floats
from splitray.errors import InputError
from splitray.sim.scenario import Scenario

_BLOCKS = 20  # of the slope test


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Samples of a run. Requests are [R], slots [T] or longer while lines were drained, devices [D].

    `backlog_tokens` and `backlog_requests` are taken at the end of each slot, `tpot_s` at its beginning (NaN without a
    placement, infinite in an outage), `edge_share` is [T, L]. `refusal` is the planner's last word where it found no
    placement.
    """

    planner: str
    scenario: Scenario
    now_s: float
    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    failed: Bools
    output_tokens: Floats
    backlog_tokens: Floats
    backlog_requests: Floats
    tpot_s: Floats
    accuracy_loss: Floats
    energy_j: Floats  # [T, D]
    edge_share: Floats
    decisions_s: Floats
    migrations: int
    migration_bytes: int
    migration_s: float
    replays: int
    refusal: InputError | None
    num_cut: int  # requests that were longer than the model's window

    @property
    def num_unfinished(self) -> int:
        """Requests that came and neither ended nor failed."""
        return int((np.isnan(self.finish_s) & ~self.failed).sum())

    @property
    def latency_s(self) -> Floats:
        """From arrival to last token; a request that has not ended counts with its age, which is a lower bound, [R]."""
        return np.where(np.isnan(self.finish_s), self.now_s, self.finish_s) - self.arrival_s

    @property
    def ttft_s(self) -> Floats:
        """From arrival to first token, likewise, [R]."""
        return np.where(np.isnan(self.first_token_s), self.now_s, self.first_token_s) - self.arrival_s

    @property
    def request_tpot_s(self) -> Floats:
        """Mean time per later token of the requests that ended and have one, [..]."""
        later = (self.output_tokens > 1) & ~np.isnan(self.finish_s)
        return (self.finish_s - self.first_token_s)[later] / (self.output_tokens[later] - 1)

    @property
    def energy_j_per_request(self) -> float:
        """Joule of all devices for each request that ended, idling included while a token is made."""
        return _mean(self.energy_j.sum(), int((~np.isnan(self.finish_s)).sum()))

    @property
    def edge_energy_j_per_request(self) -> float:
        """The edge devices' part of it."""
        edges = [d.tier == "edge" for d in self.scenario.topology.devices]
        return _mean(self.energy_j[:, edges].sum(), int((~np.isnan(self.finish_s)).sum()))

    @property
    def cost_per_request(self) -> float:
        """What the devices' prices say for the time that requests took, in the topology's currency."""
        price = sum(d.price_per_s for d in self.scenario.topology.devices)
        served = ~np.isnan(self.finish_s)
        return _mean(price * float(np.nansum(self.finish_s - self.first_token_s)), int(served.sum()))

    @property
    def backlog_slope_p(self) -> float:
        """p-value of a rise of the backlog in the second half of the run, see `drift_p`."""
        return drift_p(self.backlog_tokens[: self.scenario.num_slots])

    def document(self) -> dict[str, Any]:
        """The figures of `splitray simulate` and how many requests they stand for."""
        slots = self.scenario.num_slots
        backlog = self.backlog_tokens[:slots]
        return {
            "latency_s": _spread(self.latency_s[~self.failed]),
            "ttft_s": _spread(self.ttft_s[~self.failed]),
            "tpot_s": _spread(self.request_tpot_s),
            "energy_j_per_request": _finite(self.energy_j_per_request),
            "edge_energy_j_per_request": _finite(self.edge_energy_j_per_request),
            "cost_per_request": _finite(self.cost_per_request),
            "accuracy_loss": float(self.accuracy_loss[:slots].mean()),
            "backlog": {
                "mean": float(backlog.mean()),
                "max": float(backlog.max()),
                "slope_p": _finite(self.backlog_slope_p),
            },
            "migrations": self.migrations,
            "migration_bytes": self.migration_bytes,
            "migration_s": self.migration_s,
            "replays": self.replays,
            "decision_s": float(self.decisions_s.mean()) if len(self.decisions_s) else 0.0,
            "decisions": len(self.decisions_s),
            "requests": {
                "arrived": len(self.arrival_s),
                "finished": int((~np.isnan(self.finish_s)).sum()),
                "unfinished": self.num_unfinished,
                "failed": int(self.failed.sum()),
                "cut_to_window": self.num_cut,
            },
            "refusal": None if self.refusal is None else str(self.refusal),
        }


def together(lines: Sequence[Outcome]) -> Outcome:
    """The outcomes of one planner's lines as one: requests of all, sums of backlog and energy, means of placements."""
    if len(lines) == 1:
        return lines[0]
    each = {f.name: [getattr(x, f.name) for x in lines] for f in fields(Outcome)}
    joined: dict[str, Any] = {
        n: np.concatenate(each[n])
        for n in ("arrival_s", "first_token_s", "finish_s", "failed", "output_tokens", "decisions_s")
    }
    joined |= {n: np.sum(each[n], axis=0) for n in ("backlog_tokens", "backlog_requests", "energy_j")}
    joined |= {n: _mean_of(each[n]) for n in ("tpot_s", "edge_share")}
    joined |= {"accuracy_loss": np.mean(each["accuracy_loss"], axis=0)}
    joined |= {n: sum(each[n]) for n in ("num_cut", "migrations", "migration_bytes", "migration_s", "replays")}
    refusal = next((r for r in each["refusal"] if r is not None), None)
    return replace(lines[0], refusal=refusal, **joined)


def _mean_of(many: Sequence[Floats]) -> Floats:
    """The mean over lines where they have a value, NaN where none has."""
    values = np.array(many)
    there = np.isfinite(values)
    total, count = np.where(there, values, 0.0).sum(0), there.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def drift_p(backlog: Floats) -> float:
    """The chance of such a rise in the second half of a run if there is no drift (NaN: no backlog).

    A one-sided test on the means of `_BLOCKS` blocks, which are less dependent than slots.
    """
    tail = backlog[len(backlog) // 2 :]
    if len(tail) < 2 * _BLOCKS or not np.ptp(tail):
        return float("nan")
    means = [b.mean() for b in np.array_split(tail, _BLOCKS)]
    return float(linregress(np.arange(_BLOCKS), means, alternative="greater").pvalue)


def _spread(values: Floats) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "p50": None, "p95": None, "p99": None}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"mean": float(values.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _mean(total: float, count: int) -> float:
    return float(total / count) if count else float("nan")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
