"""One run as a short table, read from its document. Knows no engine and no device."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from splitray.report.quantities import bytes_text, seconds_text
from splitray.report.tables import columns_table, facts_table


def run_table(document: Mapping[str, Any]) -> RenderableType:
    """Times, traffic and memory of a run."""
    facts = [
        ("new tokens", f"{len(document['token_ids']):,}"),
        ("time to first token", seconds_text(document["ttft_s"])),
    ]
    if document["tpot_s"] is not None:
        rate = f" ({1 / document['tpot_s']:.1f} tokens/s)" if document["tpot_s"] else ""
        facts.append(("time per later token", seconds_text(document["tpot_s"]) + rate))
    payload, wire = document["bytes_per_token"], document["wire_bytes_per_token"]
    facts.append(("exchanges per token", f"{document['exchanges_per_token']}"))
    facts.append(("bytes per token", f"{bytes_text(payload)} ({bytes_text(wire)} with headers)"))
    memory = columns_table(("device", "weights", "KV cache", "read from disk", "process memory"))
    for device, values in document["devices"].items():
        process = values["rss_anon_bytes"]
        memory.add_row(
            device,
            *(bytes_text(values[key]) for key in ("weight_bytes", "kv_bytes", "checkpoint_bytes_read")),
            "shared" if process is None else bytes_text(process),
        )
    return Group(facts_table(facts), memory)
