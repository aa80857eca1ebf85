"""A plan as a person reads it: the picture, the predicted times and what each device holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from splitray.report.quantities import bytes_text, seconds_text, share_text
from splitray.report.tables import columns_table, facts_table
from splitray.topology import Topology

_NEAREST = 3


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
    held = {d: w for d, w in document["weights"].items() if d in predicted["memory_bytes"]}
    if len(set(held.values())) > 1 or document["weights_tried"]:
        facts.append(("weights", _formats(held)))
    if document["codec"] != "none":
        facts.append(("codec", document["codec"]))
    if rise := document["accuracy_loss"]:
        facts.append(("rise of perplexity", f"{rise:.2%}, as told by the shipped model"))
    memory = columns_table(("device", "weights and KV cache", "of its memory"))
    for device, needed in predicted["memory_bytes"].items():
        memory.add_row(device, bytes_text(needed), share_text(needed, topology.device(device).memory_bytes))
    idle = len(topology.ids) - len(predicted["memory_bytes"])
    nothing = [f"{idle:,} device{'s hold' if idle > 1 else ' holds'} nothing"] if idle else []
    return Group(facts_table(facts), memory, *nothing, *_why(document["weights_tried"]))


def _formats(weights: Mapping[str, str]) -> str:
    kinds = set(weights.values())
    return f"all {kinds.pop()}" if len(kinds) == 1 < len(weights) else ", ".join(f"{d} {w}" for d, w in weights.items())


def _why(tried: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """What `best` was chosen from: the chosen formats first, then the same for all devices, then the next best."""
    if not tried:
        return []
    chosen, *others = tried
    alike = [t for t in others if len(set(t["weights"].values())) == 1]
    nearest = [t for t in others if t not in alike and t["short"] is None][:_NEAREST]
    table = columns_table(("weights", "a later token", "energy", "rise of perplexity", "cost"))
    for each in (chosen, *nearest, *alike):
        named = _formats(each["weights"])
        if each["short"] is not None:
            table.add_row(named, "does not fit", "", "", "")
            continue
        energy, rise = f"{each['energy_j_per_token']:.3g} J", f"{each['accuracy_loss']:.2%}"
        table.add_row(named, seconds_text(each["tpot_s"]), energy, rise, f"{each['cost']:.4g}")
    return ["", "why these weights: the least cost of those that fit", table]
