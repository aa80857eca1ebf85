"""Several edges and one cloud: each planner in each cell of device, model, privacy and load, seed by seed.

A cell has so many edge devices of one kind, each with its own link, its own requests and its own planner. What loads
the cloud is what they do: under cloud_only it would be busy for half, four fifths or nearly all of the time. They
decide one after the other, and each sees how many others are there (`sim/crowd.py`). All planners get the same weather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from scipy import stats

from splitray.arrays import Floats
from splitray.evaluate.options import Options, Tell, shared_out
from splitray.evaluate.traces import EDGES, HOLDS, MODELS
from splitray.planners.protocol import RequestShape
from splitray.rl.world.cell import USUAL, Cell, references
from splitray.rl.world.weather import Climate, draw, users_of
from splitray.sim.arena import Case, run
from splitray.sim.network import varied
from splitray.sim.outcome import Outcome, drift_p
from splitray.sim.scenario import Scenario, edge_cloud_links
from splitray.sim.workload import dealt, read_requests
from splitray.unfinished import Unfinished

What = Literal["mean", "p95", "edge_j", "energy_j"]
LOADS = (0.5, 0.8, 0.95)
SEEDS = 5
MOST_USERS = 16  # more take hours to simulate; with ends pinned they load their own lines more than the cloud
RARELY, BOUND = 20, 5  # slots between decisions; see `every`
_DRIFTS = 0.01
ALONE = "alone"  # drift_plus_penalty where every edge has a cloud of its own: what no sharing can undercut by much
SIGMA = 0.7  # of the drawn bandwidth, wider than in training (0.4)


@dataclass(frozen=True, slots=True)
class LoadCell:
    """One cell: outcomes by planner, a list over seeds of a list over edges."""

    cell: Cell
    load: float
    outcomes: dict[str, list[list[Outcome]]]

    @property
    def name(self) -> str:
        """Edge device, model (* where ends are pinned to the origin) and load: the cell in one line."""
        pins = "" if self.cell.holds == "none" else " *"
        return f"{self.cell.edge} {self.cell.model}{pins} {self.load:.0%}"

    @property
    def num_users(self) -> int:
        """The number of edge devices that share the cloud."""
        return len(next(iter(self.outcomes.values()))[0])

    def values(self, planner: str, what: What) -> Floats:
        """One figure a seed, of the requests of all edges; NaN where nothing was finished, [seeds]."""
        return np.array([_figure(o, what) for o in self.outcomes[planner]])

    def drifts(self, planner: str) -> list[bool]:
        """Whether the backlog of all edges together rises in the second half of the run, seed by seed (p < 0.01)."""
        slots = self.outcomes[planner][0][0].scenario.num_slots
        together = [sum(o.backlog_tokens[:slots] for o in edges) for edges in self.outcomes[planner]]
        return [drift_p(np.asarray(b)) < _DRIFTS for b in together]

    def edge_weight_bytes(self, planner: str) -> float:
        """The most weights that an edge ever held beside embedding and head."""
        arch = self.cell.arch
        layer = arch.num_kv_heads * arch.group_params + arch.ffn_dim * arch.ffn_unit_params
        shares = [np.nansum(o.edge_share, axis=1).max(initial=0.0) for e in self.outcomes[planner] for o in e]
        return float(max(shares)) * arch.weight_bytes(layer)

    def paired(self, ours: str, other: str, what: What) -> Paired:
        """The figures of two planners on those seeds where both have one."""
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


def _figure(edges: Sequence[Outcome], what: What) -> float:
    finished = np.array([(~np.isnan(o.finish_s)).sum() for o in edges])
    if not finished.any():
        return float("nan")
    if what in ("edge_j", "energy_j"):
        each = [o.edge_energy_j_per_request if what == "edge_j" else o.energy_j_per_request for o in edges]
        return float(np.nansum(np.array(each) * finished) / finished.sum())
    latency = np.concatenate([o.latency_s[~o.failed] for o in edges])
    return float(latency.mean() if what == "mean" else np.percentile(latency, 95))


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
) -> Iterator[LoadCell]:
    """Simulate every cell, as many at once as the options have workers.

    Raises:
        InputError: a trace or the arrivals cannot be used.
    """
    jobs = [
        (Cell(edge=edge, model=model, holds=pins), load)  # type: ignore[arg-type]
        for edge in edges for model in models for pins in holds for load in loads
    ]  # fmt: skip
    one = partial(load_cell, options=replace(options, done=Unfinished()), planners=planners, seeds=seeds)
    tell(f"the first of {len(jobs)} cells")
    for i, found in enumerate(shared_out(one, jobs, options, lambda job: f"{job[0].name}, load {job[1]}")):
        tell(f"{i + 1} of {len(jobs)} cells are done, the last one {found.name}")
        yield found


def load_cell(job: tuple[Cell, float], *, options: Options, planners: Sequence[str], seeds: int) -> LoadCell:
    """One cell under all planners.

    Raises:
        InputError: a trace or the arrivals cannot be used.
    """
    cell, load = job
    worlds, found = [scenarios_of(cell, load, options, seed) for seed in range(seeds)], {}
    users = len(worlds[0])
    for planner in planners:
        cases = [
            Case(
                planner="drift_plus_penalty" if planner == ALONE else planner, scenario=scenario,
                seed=options.seed + seed, every=every(planner, cell),
                pool=seed * users + user if planner == ALONE else seed,
            )
            for seed, world in enumerate(worlds) for user, scenario in enumerate(world)
        ]  # fmt: skip
        outcomes = run(cases)
        found[planner] = [outcomes[i * users : (i + 1) * users] for i in range(seeds)]
    return LoadCell(cell, load, found)


def every(planner: str, cell: Cell) -> int:
    """Slots between decisions: one, but for programs that take too long to simulate.

    EdgeShard plans offline. Ours and myopic take up to a hundred milliseconds where memory binds: where ends are pinned
    to an edge that has no room for the whole model.
    """
    if planner == "layer_dp:paper":
        return RARELY
    tight = cell.holds != "none" and references(cell.arch, cell.topology).edge.weight_share > 0.8
    return BOUND if tight and planner in ("drift_plus_penalty", "myopic", ALONE) else 1


def scenarios_of(cell: Cell, load: float, options: Options, seed: int) -> list[Scenario]:
    """One seed's edges around one cloud: recorded bandwidth and arrivals where the options name them, else drawn.

    Edges take the recorded traces in turn, each from a point of its own. Recorded requests are dealt to the edges at
    random, from a point of the seed's own, as much closer or further apart as the load takes.
    """
    rng = np.random.default_rng([options.seed, seed, round(load * 100)])
    recorded = None
    if options.arrivals is not None:  # cut as scenarios cut them, so that the load is reckoned with what is served
        recorded = read_requests(options.arrivals).within(cell.arch.context_tokens)
    shape = USUAL
    if recorded is not None:
        shape = RequestShape(float(recorded.prompt_tokens.mean()), float(recorded.output_tokens.mean()))
    known = references(cell.arch, cell.topology, shape)
    users = min(MOST_USERS, users_of(known))
    climate = Climate(cloud_load=load, users=users, bandwidth_sigma=SIGMA, outages=True, rtt_sigma=0.2, request=shape)
    drawn = draw(
        climate, cell.topology, known, window_tokens=cell.arch.context_tokens, num_instances=users,
        num_slots=options.slots, slot_s=1.0, rng=rng,
    )  # fmt: skip
    lines = drawn.requests
    if recorded is not None:
        lines = dealt(recorded, users, users * climate.rate_per_s(known), float(options.slots), rng)
    pairs, found = edge_cloud_links(cell.topology), []
    for user, line in enumerate(lines):
        rate = drawn.link_bytes_per_s[user]
        if options.traces:
            spec = options.traces[(seed * users + user) % len(options.traces)]
            rate = varied(spec, float(rate.mean()), options.slots, 1.0, rng, what="bandwidth", repeat=True)
            rate = np.roll(rate, rng.integers(len(rate)))
        found.append(
            Scenario(
                name=f"{cell.name} {load} {seed} {user}", arch=cell.arch, topology=cell.topology, requests=line,
                num_slots=options.slots, mean_request=shape, bandwidth_bytes_per_s=dict.fromkeys(pairs, rate),
                rtt_s=dict.fromkeys(pairs, drawn.rtt_s[user]),
            )
        )  # fmt: skip
    return found
