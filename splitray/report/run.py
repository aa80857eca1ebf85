"""One run as a short table, read from its document. Knows no engine and no device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from splitray.report.quantities import bytes_text, seconds_text


def run_table(document: Mapping[str, Any]) -> RenderableType:
    """Times, traffic and memory of a run."""
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("new tokens", f"{len(document['token_ids']):,}")
    facts.add_row("time to first token", seconds_text(document["ttft_s"]))
    if document["tpot_s"] is not None:
        rate = f" ({1 / document['tpot_s']:.1f} tokens/s)" if document["tpot_s"] else ""
        facts.add_row("time per later token", seconds_text(document["tpot_s"]) + rate)
    facts.add_row("exchanges per token", f"{document['exchanges_per_token']}")
    payload, wire = document["bytes_per_token"], document["wire_bytes_per_token"]
    facts.add_row("bytes per token", f"{bytes_text(payload)} ({bytes_text(wire)} with headers)")

    memory = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", border_style="dim")
    memory.add_column("device")
    for name in ("weights", "KV cache", "read from disk", "process memory"):
        memory.add_column(name, justify="right")
    for device, values in document["devices"].items():
        process = values["rss_anon_bytes"]
        memory.add_row(
            device,
            *(bytes_text(values[key]) for key in ("weight_bytes", "kv_bytes", "checkpoint_bytes_read")),
            "shared" if process is None else bytes_text(process),
        )
    return Group(facts, memory)
