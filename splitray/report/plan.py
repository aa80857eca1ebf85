"""A plan as a person reads it: the picture, the predicted times and what each device holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from splitray.report.quantities import bytes_text, seconds_text, share_text
from splitray.topology import Topology


def plan_table(document: Mapping[str, Any], topology: Topology) -> RenderableType:
    """Times, energy and memory of a plan's document; every figure is predicted."""
    predicted = document["predicted"]
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("planner", f"{document['planner']}, decided in {seconds_text(document['decision_s'])}")
    facts.add_row("predicted time to first token", seconds_text(predicted["ttft_s"]))
    facts.add_row("predicted time per later token", seconds_text(predicted["tpot_s"]))
    facts.add_row("predicted energy per token", f"{predicted['energy_j_per_token']:.3g} J")
    facts.add_row("best of its kind", f"{seconds_text(document['optimal_tpot_s'])}, gap {document['gap']:.1%}")
    best, bound = document["global_optimal_tpot_s"], document["lower_bound"]
    proof = "proven" if document["proven"] else "no bound" if bound is None else f"none below {seconds_text(bound)}"
    facts.add_row("best of all kinds", f"{seconds_text(best)} ({proof}), gap {document['global_gap']:.1%}")
    facts.add_row("exchanges per token", f"{document['exchanges_per_token']}")
    if document["codec"] != "none":
        facts.add_row("codec", document["codec"])
    if rise := document["accuracy_loss"]:
        facts.add_row("rise of perplexity", f"{share_text(rise, 1.0)}, as told by the shipped model")
    memory = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", border_style="dim")
    for name in ("device", "weights and KV cache", "of its memory"):
        memory.add_column(name, justify="left" if name == "device" else "right")
    for device, needed in predicted["memory_bytes"].items():
        memory.add_row(device, bytes_text(needed), share_text(needed, topology.device(device).memory_bytes))
    return Group(facts, memory)
