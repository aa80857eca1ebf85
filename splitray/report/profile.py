"""A profile as a person reads it: what was measured, and when."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from splitray.report.quantities import bytes_text, seconds_text
from splitray.report.tables import facts_table


def profile_table(document: Mapping[str, Any]) -> RenderableType:
    """The numbers of a profile's document (profile.py), which are of one machine."""
    about, device = document["profile"], document["devices"][0]
    facts = [
        ("measured at", about["measured_at"]),
        ("on", f"{about['machine']['processor']}, {about['machine']['cores']} cores"),
        ("reads weights", f"{bytes_text(device['memory_bandwidth_bytes_per_s'])}/s in the engine"),
    ]
    if "shared_bandwidth_bytes_per_s" in device:
        facts.append(("while another reads", f"{bytes_text(device['shared_bandwidth_bytes_per_s'])}/s"))
    for weights, speed in device.get("formats", {}).items():
        told = (
            f"{speed['weights_per_s'] / 1e9:.1f} billion a second, {speed['prompt_weights_per_s'] / 1e9:.1f} in prompts"
        )
        facts.append((f"weights in {weights}", told))
    facts.append(("a sub-block", f"{seconds_text(device['launch_s'])} besides"))
    if about["hop_s"]:
        facts.append(("a message", f"{seconds_text(about['hop_s'])} in the engine"))
    for pair, link in about["pings"].items():
        told = f"{seconds_text(link['ping_s'])} there and back, {seconds_text(link['mebibyte_s'])} for 1 MiB"
        facts.append((f"between {pair.replace(' ', ' and ')}", told))
    cores = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("device", "GEMV", "GEMM", "copy"):
        cores.add_column(name)
    for name, core in about["cores"].items():
        cores.add_row(
            name,
            f"{bytes_text(core['gemv_bytes_per_s'])}/s",
            f"{core['gemm_flops_per_s'] / 1e9:.1f} GFLOP/s",
            f"{bytes_text(core['copy_bytes_per_s'])}/s",
        )
    return Group(facts_table(facts), "", cores)
