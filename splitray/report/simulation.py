"""A simulation as a person reads it: one table of planners, and plots. Every figure is simulated but decision_s."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from splitray.errors import unwritable
from splitray.report.plots import backlog_plot, energy_plot, front_plot, latency_plot, placement_plot, save_plots
from splitray.report.quantities import joule_text, seconds_text, share_text
from splitray.results import write_whole
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import edge_cloud_links

_OURS = "drift_plus_penalty"
COLUMNS = ("planner", "latency", "p95", "tpot", "energy", "moves", "decision", "done")


def simulation_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, quickest planner first; what has no value is a dash."""
    planners = document["planners"]

    def order(name: str) -> tuple[bool, float]:
        requests, latency = planners[name]["requests"], planners[name]["latency_s"]["mean"]
        return requests["finished"] == 0, float("inf") if latency is None else latency

    return [(name, *_cells(planners[name])) for name in sorted(planners, key=order)]


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    requests = found["requests"]
    done = f"{requests['finished']}/{requests['arrived']}"
    if requests["finished"] == 0:
        return ("-",) * (len(COLUMNS) - 2) + (done,)

    def text(value: float | None, of: Callable[[float], str] = seconds_text) -> str:
        return "-" if value is None else of(value)

    return (
        text(found["latency_s"]["mean"]), text(found["latency_s"]["p95"]),
        text(found["tpot_s"]["mean"]), text(found["energy_j_per_request"], joule_text),
        text(found["migrations"], str), text(found["decision_s"]), done,
    )  # fmt: skip


def simulation_table(document: Mapping[str, Any]) -> Table:
    """One row a planner: times and energy of a request, and of a later token; it fits 80 columns.

    A long name is folded, and no number is cut. What perplexity rises by stands there if anything makes it rise.
    """
    planners = document["planners"]
    lossy = any(found["accuracy_loss"] > 0 for found in planners.values())
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim", border_style="dim")
    for name in COLUMNS:
        named = name == "planner"
        table.add_column(name, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    if lossy:
        table.add_column("+ppl", justify="right", no_wrap=True)
    for row in simulation_rows(document):
        rise = planners[row[0]]["accuracy_loss"]
        table.add_row(*row, *(["-" if np.isnan(rise) else share_text(rise, 1.0)] if lossy else []))
    return table


def plots_of(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Latency, backlog, energy, the front of the two, and what each planner that moved, and ours, held when."""
    placed = [o for o in outcomes if (~np.isnan(o.finish_s)).any()]
    slots, slot_s = outcomes[0].scenario.num_slots, outcomes[0].scenario.slot_s
    time_s = (np.arange(slots) * slot_s).tolist()
    latency = {o.planner: float(o.latency_s[~o.failed].mean()) for o in placed}
    energy = {o.planner: o.energy_j_per_request for o in placed}
    figures = {
        "latency": latency_plot({o.planner: o.latency_s[~o.failed].tolist() for o in placed}),
        "backlog": backlog_plot(time_s, {o.planner: o.backlog_tokens[:slots].tolist() for o in placed}),
        "energy": energy_plot(energy),
        "front": front_plot(latency, energy),
    }
    shown = [o for o in outcomes if o.planner.partition(":")[0] == _OURS or _moved(o)]
    for o in shown or placed[-1:]:
        figures[f"placement-{o.planner.replace(':', '-')}"] = _map(o, time_s)
    return figures


def _moved(outcome: Outcome) -> bool:
    placed = outcome.edge_share[~np.isnan(outcome.edge_share).any(axis=1)]
    return placed.size > 0 and bool((np.ptp(placed, axis=0) > 0).any())


def _map(outcome: Outcome, time_s: list[float]) -> Figure:
    scenario = outcome.scenario
    ids, pairs = scenario.topology.ids, edge_cloud_links(scenario.topology)
    a, b = pairs[0] if pairs else (ids[0], ids[-1])
    link = scenario.topology.link(a, b)
    always = np.full(scenario.num_slots, 0.0 if link is None else link.bandwidth_bytes_per_s)
    seen = scenario.bandwidth_bytes_per_s.get((a, b), always)
    edges = scenario.topology.tier("edge")
    return placement_plot(
        outcome.planner, time_s, outcome.edge_share.T.tolist(), seen.tolist(), ", ".join(edges) or "no edge"
    )


def save_simulation(document: dict[str, Any], outcomes: list[Outcome], out: Path) -> list[Path]:
    """`simulation.json`, the raw samples as `samples.npz`, and the plots.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        write_whole(out / "simulation.json", json.dumps(document, indent=1) + "\n")
        samples = {
            f"{o.planner}/{name}": getattr(o, name)
            for o in outcomes
            for name in ("arrival_s", "first_token_s", "finish_s", "backlog_tokens", "tpot_s", "energy_j")
        }
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **samples)
        write_whole(out / "samples.npz", packed.getvalue())
        return [out / "simulation.json", out / "samples.npz", *save_plots(plots_of(outcomes), out)]
    except OSError as error:
        raise unwritable("--out", error) from error
