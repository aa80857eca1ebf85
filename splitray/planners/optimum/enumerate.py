"""The optimum of small instances, by every way to share each sub-block by counts. Memory is a hard limit.

Tests hold it against every assignment, a mixed-integer program and `CostModel`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from splitray.arrays import Floats
from splitray.planners.optimum.space import MISSING_S, Counts, Kind, Space

Step = tuple[int, tuple[Counts, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to do a sub-block: its holding, pieces by device for each part, seconds and bytes, [D]."""

    holding: int
    counts: tuple[Counts, ...]
    work_s: Floats
    held_bytes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best path: seconds a token, its steps (`Space.placement`) and the embedding's holding; None if none fits."""

    tpot_s: float
    path: tuple[Step, ...]
    embedding: int


def options(space: Space, kind: Kind, *, embedding: int = -1) -> list[Option]:
    """Every way to do a sub-block by counts."""
    found, allowed = [], space.allowed(kind)
    for index, holding in enumerate(space.holdings):
        if not allowed[index]:
            continue
        pieces = space.pieces(kind)
        if holding.replicated or len(holding.devices) == 1:
            choices = [tuple(_on(space.num_devices, holding.devices, [p.count] * len(holding.devices)) for p in pieces)]
        else:
            per_part = [list(_compositions(p.count, holding.devices, space.num_devices)) for p in pieces]
            choices = [each for each in product(*per_part) if all(any(c[d] for c in each) for d in holding.devices)]
        found += [priced(space, kind, index, c, embedding) for c in choices]
    return found


def priced(space: Space, kind: Kind, holding: int, counts: tuple[Counts, ...], embedding: int) -> Option:
    """One way to do a sub-block with its seconds and bytes."""
    used = np.zeros(space.num_devices)
    used[list(space.holdings[holding].devices)] = 1
    free = space.free_rows(kind, embedding)
    work, held = used * space.launch_s, np.zeros(space.num_devices)
    for part, count in zip(space.pieces(kind), counts, strict=True):
        work = work + np.array(count) * part.piece_s
        held = held + np.where(free, 0.0, np.array(count) * part.piece_bytes)
    return Option(holding=holding, counts=counts, work_s=work, held_bytes=held)


def _on(num_devices: int, devices: tuple[int, ...], counts: list[int]) -> Counts:
    row = [0] * num_devices
    for d, c in zip(devices, counts, strict=True):
        row[d] = c
    return tuple(row)


def _compositions(total: int, devices: tuple[int, ...], num_devices: int) -> Iterator[Counts]:
    """All ways to give `total` pieces to some of the devices."""

    def spread(left: int, over: int) -> Iterator[list[int]]:
        if over == 1:
            yield [left]
            return
        for first in range(left + 1):
            for rest in spread(left - first, over - 1):
                yield [first, *rest]

    for counts in spread(total, len(devices)):
        yield _on(num_devices, devices, counts)


def by_counts(space: Space) -> Found | None:
    """Labels of clocks and memory over the sub-blocks, dropped only where another is no worse in all of them."""
    best: Found | None = None
    for embedding in space.embeddings:
        first = space.table_on[embedding] * space.table_bytes
        labels: list[tuple[Floats, Floats, tuple[Step, ...]]] = []
        entry = space.entry_s
        known = {kind: options(space, kind, embedding=embedding) for kind in set(space.kinds)}
        for stage, kind in enumerate(space.kinds):
            table = space.crossing_s(kind)
            grown: dict[int, list[tuple[Floats, Floats, tuple[Step, ...]]]] = {}
            sources = labels if stage else [(np.zeros(0), first, ())]
            for clock, held, path in sources:
                space.deadline.check()
                for o in known[kind]:
                    came = (
                        entry[embedding, o.holding]
                        if not stage
                        else np.max(clock[:, None] + table[path[-1][0], o.holding], axis=0)
                    )
                    total = held + o.held_bytes
                    finish = came + o.work_s
                    if (total <= space.memory_bytes).all() and finish.max() < MISSING_S / 2:
                        grown.setdefault(o.holding, []).append((finish, total, (*path, (o.holding, o.counts))))
            labels = [x for each in grown.values() for x in _undominated(each)]
        for clock, _, path in labels:
            seconds = float(np.max(clock + space.exit_s[path[-1][0], :, embedding]))
            if seconds < MISSING_S / 2 and (best is None or seconds < best.tpot_s):
                best = Found(tpot_s=seconds, path=path, embedding=embedding)
    return best


def _undominated(
    labels: list[tuple[Floats, Floats, tuple[Step, ...]]],
) -> list[tuple[Floats, Floats, tuple[Step, ...]]]:
    keys = np.array([np.concatenate([np.where(np.isfinite(c), c, 0.0), m]) for c, m, _ in labels])
    order = np.lexsort(keys.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (keys[kept] <= keys[i] + 1e-15).all(1).any():
            kept.append(int(i))
    return [labels[i] for i in kept]
