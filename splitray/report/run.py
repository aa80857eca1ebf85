"""One run as a document (the JSON keys of ARCHITECTURE.md) and as a short table. Knows no engine and no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from splitray.report.quantities import bytes_text, seconds_text

Document = dict[str, Any]
_RUN_KEYS = ("ttft_s", "tpot_s")
_TRAFFIC_KEYS = ("messages_per_token", "bytes_per_token", "wire_bytes_per_token", "driver_bytes_per_token")


def run_document(
    *,
    token_ids: Sequence[int],
    text: str | None,
    run: Mapping[str, Any],
    exchanges_per_token: int,
    epoch: int,
    devices: Mapping[str, Mapping[str, Any]],
    shared_process: bool = False,
) -> Document:
    """What `splitray generate --json` prints.

    Args:
        token_ids: the new ones only.
        text: of these, or None without a tokenizer.
        run: the fields of the engine's RunReport.
        exchanges_per_token: of the engine's route.
        epoch: of the placement that ran.
        devices: the engine's stats, by device.
        shared_process: the devices are threads, so that memory cannot be told apart.
    """
    return {
        "token_ids": list(token_ids),
        "text": text,
        **{key: run[key] for key in _RUN_KEYS},
        "exchanges_per_token": exchanges_per_token,
        **{key: run[key] for key in _TRAFFIC_KEYS},
        "epoch": epoch,
        "devices": {
            device: {
                "weight_bytes": stats["weight_bytes"],
                "kv_bytes": run["kv_bytes"].get(device, 0),  # the run has freed its KV by now
                "checkpoint_bytes_read": stats["checkpoint_bytes_read"],
                "rss_anon_bytes": None if shared_process else stats["rss_anon_bytes"],
            }
            for device, stats in devices.items()
        },
    }


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
