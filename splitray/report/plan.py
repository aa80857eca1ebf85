"""A plan as a person reads it: the picture, the predicted times and what each device holds."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from splitray.report.quantities import bytes_text, seconds_text, share_text
from splitray.report.tables import columns_table, facts_table
from splitray.topology import Topology


def plan_table(document: Mapping[str, Any], topology: Topology) -> RenderableType:
    """Times, energy and memory of a plan's document; every figure is predicted."""
    predicted = document["predicted"]
    best = document["global_optimal_tpot_s"]
    proof = "proven" if document["proven"] else f"not proven, none below {seconds_text(document['lower_bound'])}"
    facts = [
        ("planner", f"{document['planner']}, decided in {seconds_text(document['decision_s'])}"),
        ("cut into", document["grain"]),
        ("predicted time to first token", seconds_text(predicted["ttft_s"])),
        ("predicted time per later token", seconds_text(predicted["tpot_s"])),
        ("predicted energy per token", f"{predicted['energy_j_per_token']:.3g} J"),
        ("best of its kind", f"{seconds_text(document['optimal_tpot_s'])}, gap {document['gap']:.1%}"),
        ("best of all kinds", f"{seconds_text(best)} ({proof}), gap {document['global_gap']:.1%}"),
        ("exchanges per token", f"{document['exchanges_per_token']}"),
    ]
    if document["codec"] != "none":
        facts.append(("codec", document["codec"]))
    if rise := document["accuracy_loss"]:
        facts.append(("rise of perplexity", f"{share_text(rise, 1.0)}, as told by the shipped model"))
    memory = columns_table(("device", "weights and KV cache", "of its memory"))
    for device, needed in predicted["memory_bytes"].items():
        memory.add_row(device, bytes_text(needed), share_text(needed, topology.device(device).memory_bytes))
    idle = len(topology.ids) - len(predicted["memory_bytes"])
    nothing = [f"{idle:,} device{'s hold' if idle > 1 else ' holds'} nothing"] if idle else []
    return Group(facts_table(facts), memory, *nothing)
