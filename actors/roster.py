"""Who sits where and holds what, as lines to read. Knows no actor and no engine."""

from collections.abc import Mapping
from typing import Any

from actors.device import Seat
from splitray.placement import Placement, Shares


def roster(placement: Placement, seats: Mapping[str, Seat], stats: Mapping[str, Mapping[str, Any]]) -> str:
    """One paragraph for each device: its node, its memory, its pieces (`stats` are the engine's)."""
    lines = []
    for device, seat in seats.items():
        weights, memory = (stats[device][key] / 1e6 for key in ("weight_bytes", "rss_anon_bytes"))
        lines.append(f"{device}: node {seat.node_ip} ({seat.hostname}, {seat.node_id[:8]}), process {seat.pid}")
        lines.append(f"    {weights:,.1f} MB of weights in {memory:,.0f} MB of memory")
        lines += [f"    {piece}" for piece in pieces(placement, device)]
    return "\n".join(lines)


def pieces(placement: Placement, device: str) -> list[str]:
    """What a device holds, in half-open ranges; equal neighbouring layers in one line."""
    runs: list[tuple[int, int, str]] = []
    for i, layer in enumerate(placement.layers):
        held = [
            f"{name} {_ranges(shares, device)}"
            for name, shares in (("head groups", layer.attention), ("FFN", layer.ffn))
            if shares.ranges(device)
        ]
        what = ", ".join(held)
        if runs and runs[-1][1:] == (i, what):
            runs[-1] = (runs[-1][0], i + 1, what)
        else:
            runs.append((i, i + 1, what))
    found = ["embedding"] if device in placement.embedding else []
    found += [f"layers [{start}, {stop}): {what}" for start, stop, what in runs if what]
    if placement.head.ranges(device):
        found.append(f"head: rows {_ranges(placement.head, device)}")
    return found or ["no piece: prompts start and tokens end here"]


def _ranges(shares: Shares, device: str) -> str:
    return " ".join(f"[{r.start}, {r.stop})" for r in shares.ranges(device))
