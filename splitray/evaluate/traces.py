"""One edge device and the cloud over bandwidth traces: every online planner in every cell of devices and models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from splitray.catalog import architecture
from splitray.evaluate.options import Options, Tell
from splitray.report.document import Cell, Number, Table, Unit
from splitray.sim.arena import Case
from splitray.sim.arena import run as simulate
from splitray.sim.network import arrivals, links_varied
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario, edge_cloud_links
from splitray.sim.service import service_s
from splitray.topology import Topology

EDGES = ("jetson-orin-nx-16gb", "galaxy-s23", "raspberry-pi-5")
MODELS = ("gpt2-xl", "llama-7b", "llama-13b")
Holds = Literal["none", "embedding_and_head"]
HOLDS: tuple[Holds, ...] = ("none", "embedding_and_head")
ONLINE = (
    "cloud_only", "cloud_only_rtt", "edge_only", "best_device", "static_cut:paper", "static_cut", "layer_cut:paper",
    "layer_cut", "layer_dp:paper", "layer_dp", "greedy", "tensor_parallel:paper", "tensor_parallel", "ucb",
    "myopic:paper", "myopic", "drift_plus_penalty",
)  # fmt: skip
VARIANTS = (
    "What ends in :paper may choose only what its paper describes; the same name alone may use every device, cut and "
    "end, and myopic every piece, as the others do."
)
DRAWN = ("log_ar1:0.4", "log_ar1:0.8", "log_ar1:0.4+gilbert_elliott")  # where no trace is given
EVERY = 4  # slots between decisions
LOAD = 0.3  # of what a static cut serves
REQUESTS = 30  # about so many in a run: slots are longer where few come


@dataclass(frozen=True, slots=True)
class TraceCell:
    """One edge device, model and privacy setting, with an outcome for each trace and planner."""

    edge: str
    model: str
    holds: str
    outcomes: dict[tuple[str, str], Outcome]

    @property
    def name(self) -> str:
        """Edge device and model: the cell in one line."""
        return f"{self.edge} {self.model}"

    def ratio(self, planner: str, against: str, quantity: str = "latency_s") -> float:
        """Geometric mean over traces of the planner's mean over the other's; NaN where one of them never fits."""
        logs = [np.log(mean_of(a, quantity) / mean_of(b, quantity)) for a, b in self.pairs(planner, against)]
        return float(np.exp(np.mean(logs))) if logs else float("nan")

    def pairs(self, planner: str, against: str) -> list[tuple[Outcome, Outcome]]:
        """Outcomes of the two on the same traces, where both have a placement."""
        traces = dict.fromkeys(t for t, _ in self.outcomes)
        both = [(self.outcomes[t, planner], self.outcomes[t, against]) for t in traces]
        return [(a, b) for a, b in both if _placed(a) and _placed(b)]


def trace_cells(options: Options, tell: Tell) -> Iterator[TraceCell]:
    """Every device by model by privacy setting, simulated one after the other.

    Raises:
        InputError: a trace or the arrivals cannot be used.
    """
    for model in MODELS:
        for edge in EDGES:
            for holds in HOLDS:
                name = f"{model} on {edge}, origin holds {holds.replace('_', ' ')}"
                tell(name)
                yield options.done.of(name, partial(_trace_cell, options, model, edge, holds))


def _trace_cell(options: Options, model: str, edge: str, holds: Holds) -> TraceCell:
    arch, where = architecture(model), Topology.pair(edge, origin_holds=holds)
    line_rng = np.random.default_rng([options.seed, 1])
    rate = LOAD / service_s(arch, where, "static_cut:paper")
    slot_s = max(1.0, REQUESTS / (rate * options.slots)) if options.arrivals is None else 1.0
    line = arrivals(options.arrivals, options.slots * slot_s, rate, line_rng)
    cases = []
    for spec in options.traces or DRAWN:
        rng = np.random.default_rng([options.seed, 2])
        pairs = edge_cloud_links(where)
        rates = links_varied(spec, where, pairs, options.slots, slot_s, rng, what="bandwidth", repeat=True)
        scenario = Scenario(
            name=spec.rpartition("/")[2], arch=arch, topology=where, requests=line,
            num_slots=options.slots, slot_s=slot_s, bandwidth_bytes_per_s=rates,
        )  # fmt: skip
        cases += [Case(planner=p, scenario=scenario, seed=options.seed, every=EVERY) for p in ONLINE]
    found = simulate(cases)
    return TraceCell(edge, model, holds, {(o.scenario.name, o.planner): o for o in found})


def _placed(outcome: Outcome) -> bool:
    """Whether the planner ever found a placement, and anybody asked; being too slow is no reason to be left out."""
    return len(outcome.arrival_s) > 0 and bool(np.isfinite(outcome.edge_share).any())


def mean_of(outcome: Outcome, quantity: str) -> float:
    """The mean of one of the outcome's samples over all requests; who got no answer counts with its age."""
    return float(np.mean(getattr(outcome, quantity)))


def simulated(value: float, unit: Unit) -> Number:
    """A figure of the virtual clock; none if it is not finite."""
    return Number(float(value) if np.isfinite(value) else None, unit, "simulated")


def summary(cells: Sequence[TraceCell], holds: str) -> Table:
    """A row a planner: against cloud_only over all cells and traces."""
    mine = [c for c in cells if c.holds == holds]
    rows: list[tuple[Cell, ...]] = []
    for planner in ONLINE:
        pairs = [p for c in mine for p in c.pairs(planner, "cloud_only")]
        runs = sum(len({t for t, _ in c.outcomes}) for c in mine)
        if not pairs:
            rows.append((planner, *("never fits",) * 8))
            continue
        latency = np.array([mean_of(a, "latency_s") / mean_of(b, "latency_s") for a, b in pairs])
        p95 = np.array([np.percentile(a.latency_s, 95) / np.percentile(b.latency_s, 95) for a, b in pairs])
        edge = [a.edge_energy_j_per_request for a, _ in pairs]
        decisions = np.concatenate([a.decisions_s for a, _ in pairs])
        slower = f"{(latency > 1 + 1e-9).sum()} of {len(pairs)}, {runs - len(pairs)} unfit"
        ratios = (np.exp(np.log(latency).mean()), latency.min(), latency.max(), np.exp(np.log(p95).mean()))
        joules = (np.mean([a.energy_j_per_request for a, _ in pairs]), np.mean(edge))
        rows.append((
            planner, *(simulated(r, "ratio") for r in ratios), Number(None, "", "simulated", slower),
            *(simulated(float(j), "J") for j in joules), Number(float(decisions.mean()), "s", "measured"),
        ))  # fmt: skip
    return Table(
        f"Against cloud_only, origin holds {holds.replace('_', ' ')}",
        ("planner", "latency", "best", "worst", "p95", "slower than cloud_only", "energy", "edge energy", "decision"),
        tuple(rows),
        "Ratios of mean latency to cloud_only's (streamed): geometric mean, best and worst over devices, models and "
        f"traces. {VARIANTS} Unfit: no placement of the planner's kind fits. Energy of a request of all devices, and "
        "of the edge.",
    )


def latencies(cells: Sequence[TraceCell], holds: str) -> Table:
    """Mean latencies, a row a cell and a column a planner."""
    rows = []
    for cell in (c for c in cells if c.holds == holds):
        asked = [len(o.arrival_s) for (_, p), o in cell.outcomes.items() if p == ONLINE[0]]
        row: list[Cell] = [cell.name, Number(float(np.sum(asked)), "count", "simulated")]
        for planner in ONLINE:
            mine = [o for (_, p), o in cell.outcomes.items() if p == planner]
            values = [mean_of(o, "latency_s") for o in mine if _placed(o)]
            row.append(simulated(float(np.mean(values)) if values else float("nan"), "s"))
        rows.append(tuple(row))
    title = f"Mean latency of a request, origin holds {holds.replace('_', ' ')}"
    return Table(
        title,
        ("cell", "requests", *ONLINE),
        tuple(rows),
        "Means over the traces; requests that had not ended when the run did count with their age. -: nothing fits.",
    )


def pairwise(cells: Sequence[TraceCell]) -> Table:
    """How often drift_plus_penalty is slower than each other planner."""
    rows: list[tuple[Cell, ...]] = []
    for other in ONLINE[:-1]:
        pairs = [p for c in cells for p in c.pairs("drift_plus_penalty", other)]
        ratio = np.array([mean_of(a, "latency_s") / mean_of(b, "latency_s") for a, b in pairs])
        if not len(ratio):
            continue
        share, count = float((ratio > 1 + 1e-6).mean()), len(ratio)
        ratios = (float(np.exp(np.log(ratio).mean())), ratio.max())
        told = (simulated(share, "share"), *(simulated(r, "ratio") for r in ratios), simulated(count, "count"))
        rows.append((other, *told))
    return Table(
        "drift_plus_penalty against each",
        ("planner", "loses in", "latency ratio", "worst", "runs"),
        tuple(rows),
        VARIANTS,
    )
