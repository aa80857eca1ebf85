"""The optimum of tiny instances by every assignment of single pieces: an oracle for planners/optimum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.planners.optimum.enumerate import Found, Option, priced
from splitray.planners.optimum.patterns import BlockHolding
from splitray.planners.optimum.space import MISSING_S, Kind, Space


def by_force(space: Space) -> Found | None:
    """Every head group and every block on every device, and every copy: all combinations, priced side by side."""
    best: Found | None = None
    for embedding in space.embeddings:
        known = {k: list(_assignments(space, k, embedding)) for k in set(space.kinds)}
        sizes = [len(known[k]) for k in space.kinds]
        index = np.indices(sizes).reshape(len(sizes), -1)
        clock: Floats = np.zeros((index.shape[1], space.num_devices))
        held = np.zeros_like(clock)
        held += space.table_on[embedding] * space.table_bytes
        before: Ints | None = None
        for stage, kind in enumerate(space.kinds):
            chosen = known[kind]
            work = np.array([o.work_s for o in chosen])[index[stage]]
            held += np.array([o.held_bytes for o in chosen])[index[stage]]
            at = np.array([o.holding for o in chosen])[index[stage]]
            if before is None:
                came = space.entry_s[embedding, at]
            else:
                came = np.max(clock[:, :, None] + space.crossing_s(kind)[before, at], axis=1)
            clock, before = came + work, at
        seconds = np.max(clock + space.exit_s[before, :, embedding], axis=1)
        seconds = np.where((held <= space.memory_bytes).all(1), seconds, np.inf)
        row = int(seconds.argmin())
        if seconds[row] < MISSING_S / 2 and (best is None or seconds[row] < best.tpot_s):
            steps = [known[k][index[s, row]] for s, k in enumerate(space.kinds)]
            path = tuple((o.holding, o.counts) for o in steps)
            best = Found(tpot_s=float(seconds[row]), path=path, embedding=embedding)
    return best


def _assignments(space: Space, kind: Kind, embedding: int) -> Iterator[Option]:
    """Every map of single pieces to devices, equal ones included, and every full copy."""
    allowed = space.allowed(kind)
    index = {h: i for i, h in enumerate(space.holdings)}
    pieces = space.pieces(kind)
    for h, i in index.items():
        if h.replicated and allowed[i]:
            counts = tuple(tuple(p.count * (d in h.devices) for d in range(space.num_devices)) for p in pieces)
            yield priced(space, kind, i, counts, embedding)
    for maps in product(*(product(range(space.num_devices), repeat=p.count) for p in pieces)):
        devices = tuple(sorted({d for each in maps for d in each}))
        holding = index.get(BlockHolding(devices))
        if holding is not None and allowed[holding]:
            counts = tuple(tuple(each.count(d) for d in range(space.num_devices)) for each in maps)
            yield priced(space, kind, holding, counts, embedding)
