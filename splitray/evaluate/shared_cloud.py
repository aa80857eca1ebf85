"""Several edges and one cloud: each planner in each cell of device, model, privacy and load, seed by seed.

One edge's line is simulated; the other users of the cloud take a share of its speed that is drawn (`rl/weather.py`), so
that under cloud_only the cloud is loaded by half, four fifths or nearly all. Every planner sees the same weather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from splitray.evaluate import Options, Tell
from splitray.evaluate.traces import EDGES, HOLDS, MODELS
from splitray.rl.cell import CLOUD_DEVICE, Cell, references
from splitray.rl.weather import Climate, Weather, draw
from splitray.sim.arena import Case, run
from splitray.sim.network import arrivals, varied
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario, edge_cloud_links

Floats = NDArray[np.float64]
LOADS = (0.5, 0.8, 0.95)
USERS = 4
SEEDS = 5
SIGMA = 0.7  # of the drawn bandwidth, wider than in training (0.4)


@dataclass(frozen=True, slots=True)
class LoadCell:
    """One cell: outcomes by planner, a list over seeds."""

    cell: Cell
    load: float
    outcomes: dict[str, list[Outcome]]

    @property
    def name(self) -> str:
        """One line for a table."""
        pins = "" if self.cell.holds == "none" else " *"
        return f"{self.cell.edge} {self.cell.model}{pins} {self.load:.0%}"

    def values(self, planner: str, what: Literal["mean", "p95", "edge_j", "energy_j"]) -> Floats:
        """One figure a seed; NaN where nothing was finished, [seeds]."""
        return np.array([_figure(o, what) for o in self.outcomes[planner]])

    def paired(self, ours: str, other: str, what: Literal["mean", "p95", "edge_j", "energy_j"]) -> Paired:
        """Both planners on the same seeds."""
        a, b = self.values(ours, what), self.values(other, what)
        both = np.isfinite(a) & np.isfinite(b)
        return Paired(a[both], b[both])


@dataclass(frozen=True, slots=True)
class Paired:
    """Figures of two planners on the same seeds."""

    ours: Floats
    other: Floats

    @property
    def ratio(self) -> float:
        """Geometric mean of ours over theirs; NaN without a pair."""
        return float(np.exp(np.mean(np.log(self.ours / self.other)))) if len(self.ours) else float("nan")

    @property
    def p_lower(self) -> float:
        """The chance of such a difference if ours were not lower: a one-sided paired t test on logarithms."""
        difference = np.log(self.ours) - np.log(self.other)
        if len(difference) < 2 or not np.ptp(difference):
            return 0.0 if len(difference) and difference[0] < -1e-9 else 1.0
        return float(stats.ttest_1samp(difference, 0.0, alternative="less").pvalue)


def mean_and_interval(values: Floats) -> tuple[float, float]:
    """The mean over seeds and half of its 95 % confidence interval; NaN without values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    if len(finite) < 2:
        return float(finite[0]), float("nan")
    half = stats.t.ppf(0.975, len(finite) - 1) * finite.std(ddof=1) / np.sqrt(len(finite))
    return float(finite.mean()), float(half)


def _figure(outcome: Outcome, what: str) -> float:
    finished = ~np.isnan(outcome.finish_s)
    if not finished.any():
        return float("nan")
    latency = outcome.latency_s[~outcome.failed]
    match what:
        case "mean":
            return float(latency.mean())
        case "p95":
            return float(np.percentile(latency, 95))
        case "edge_j":
            return outcome.edge_energy_j_per_request
        case _:
            return outcome.energy_j_per_request


def load_cells(
    options: Options,
    planners: Sequence[str],
    tell: Tell,
    *,
    edges: Sequence[str] = EDGES,
    models: Sequence[str] = MODELS,
    holds: Sequence[str] = HOLDS,
    loads: Sequence[float] = LOADS,
    seeds: int = SEEDS,
    every: int = 1,
) -> Iterator[LoadCell]:
    """Simulate every cell, one after the other.

    Raises:
        InputError: a trace or the arrivals cannot be used.
    """
    for edge in edges:
        for model in models:
            for pins in holds:
                cell = Cell(edge=edge, model=model, holds=pins)  # type: ignore[arg-type]
                for load in loads:
                    tell(f"{cell.name}, the cloud loaded by {load:.0%}")
                    scenarios = [scenario_of(cell, load, options, seed) for seed in range(seeds)]
                    cases = [
                        Case(planner=p, scenario=s, seed=options.seed + i, every=every)
                        for p in planners
                        for i, s in enumerate(scenarios)
                    ]
                    found = run(cases)
                    yield LoadCell(cell, load, {p: found[i * seeds : (i + 1) * seeds] for i, p in enumerate(planners)})


def scenario_of(cell: Cell, load: float, options: Options, seed: int) -> Scenario:
    """The weather of one seed: recorded bandwidth and arrivals where the options name them, else drawn."""
    climate = Climate(cloud_load=load, users=USERS, bandwidth_sigma=SIGMA, outages=True, rtt_sigma=0.2)
    rng = np.random.default_rng([options.seed, seed, round(load * 100)])
    known = references(cell.arch, cell.topology, climate.request)
    drawn: Weather = draw(
        climate, cell.topology, known, window_tokens=cell.arch.context_tokens, num_instances=1,
        num_slots=options.slots, slot_s=1.0, rng=rng,
    )  # fmt: skip
    rate = drawn.link_bytes_per_s[0]
    if options.traces:
        spec = options.traces[seed % len(options.traces)]
        rate = varied(spec, float(rate.mean()), options.slots, 1.0, rng, what="bandwidth", repeat=True)
    line = drawn.requests[0]
    if options.arrivals is not None:
        line = arrivals(options.arrivals, options.slots, climate.own_load / known.service_s, rng)
    taken = np.zeros((options.slots, 2))
    taken[:, CLOUD_DEVICE] = drawn.cloud_taken[0]
    pairs = edge_cloud_links(cell.topology)
    return Scenario(
        name=f"{cell.name} {load} {seed}", arch=cell.arch, topology=cell.topology, requests=line,
        num_slots=options.slots, background=taken, background_memory=False,
        bandwidth_bytes_per_s=dict.fromkeys(pairs, rate), rtt_s=dict.fromkeys(pairs, drawn.rtt_s[0]),
    )  # fmt: skip
