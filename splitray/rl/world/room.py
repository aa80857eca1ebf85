"""How much of the edge's memory each group of layers takes: what masks reckon with.

Shapes: N instances, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.rl.grid.choice import CLOUD, EDGE, SPLIT, Choice
from splitray.rl.grid.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes of a group's heads (with their KV) and columns, and of the edge beside embedding and head."""

    attention_bytes: Floats  # [N, G]
    ffn_bytes: Floats  # [G]
    edge_bytes: Floats  # [N]

    def take(self, rows: Ints) -> Room:
        """A copy of the instances `rows`."""
        return Room(
            attention_bytes=self.attention_bytes[rows], ffn_bytes=self.ffn_bytes, edge_bytes=self.edge_bytes[rows]
        )


def room_of(grid: Grid, memory_bytes: Floats, longest_tokens: Floats) -> Room:
    """Measured on the grid itself, for the memory [N, 2] and the longest requests [N] of instances."""
    g = grid.num_groups
    zeros = np.zeros((g + 1, g), np.int64)
    mode = np.full((g + 1, g), CLOUD, np.int8)
    heads = zeros.copy()
    at = np.arange(g)
    mode[at, at], heads[at, at] = SPLIT, grid.num_heads  # row g: nothing but embedding and head on the edge
    ends = np.full(g + 1, EDGE)
    attention = Choice(mode, heads, zeros, ends, ends)
    fixed, one_token = (grid.memory_bytes(attention, n)[:, EDGE] for n in (0.0, 1.0))
    whole = mode.copy()
    whole[at, at] = EDGE
    ffn = grid.memory_bytes(Choice(whole, heads, zeros, ends, ends), 0.0)[:g, EDGE] - fixed[:g]
    return Room(
        attention_bytes=fixed[:g] - fixed[g] + (one_token - fixed)[:g] * longest_tokens[:, None],
        ffn_bytes=ffn,
        edge_bytes=memory_bytes[:, EDGE] - fixed[g],
    )
