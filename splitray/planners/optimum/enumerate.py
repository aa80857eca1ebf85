"""The optimum of small instances, three times: every assignment, every count, and a mixed-integer program.

They share the tables of `Space` and nothing else; tests hold them against each other and against `CostModel`. Memory
is a hard limit in all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from splitray.planners.optimum.space import MISSING_S, Counts, Floats, Holding, Kind, Space

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
    """The best path: seconds a token, its steps (`Space.placement`) and the embedding's device; None if none fits."""

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
            choices = [c for c in product(*per_part) if _uses_all(c, holding)]
        found += [_priced(space, kind, index, c, embedding) for c in choices]
    return found


def _priced(space: Space, kind: Kind, holding: int, counts: tuple[Counts, ...], embedding: int) -> Option:
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


def _uses_all(counts: tuple[Counts, ...], holding: Holding) -> bool:
    return all(any(c[d] for c in counts) for d in holding.devices)


def by_counts(space: Space) -> Found | None:
    """Labels of clocks and memory over the sub-blocks, dropped only where another is no worse in all of them."""
    best: Found | None = None
    for embedding in space.embeddings:
        first = np.where(np.arange(space.num_devices) == embedding, space.table_bytes, 0.0)
        labels: list[tuple[Floats, Floats, tuple[Step, ...]]] = []
        entry = space.entry_s
        known = {kind: options(space, kind, embedding=embedding) for kind in set(space.kinds)}
        for stage, kind in enumerate(space.kinds):
            table = space.crossing_s(kind)
            grown: dict[int, list[tuple[Floats, Floats, tuple[Step, ...]]]] = {}
            sources = labels if stage else [(np.zeros(0), first, ())]
            for clock, held, path in sources:
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


def by_force(space: Space) -> Found | None:
    """Every head group and every block on every device, and every copy: all combinations, priced side by side."""
    best: Found | None = None
    for embedding in space.embeddings:
        known = {k: list(_assignments(space, k, embedding)) for k in set(space.kinds)}
        sizes = [len(known[k]) for k in space.kinds]
        index = np.indices(sizes).reshape(len(sizes), -1)
        clock: Floats = np.zeros((index.shape[1], space.num_devices))
        held = np.zeros_like(clock)
        held[:, embedding] = space.table_bytes
        before: NDArray[np.int64] | None = None
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
            counts = tuple(_on(space.num_devices, h.devices, [p.count] * len(h.devices)) for p in pieces)
            yield _priced(space, kind, i, counts, embedding)
    for maps in product(*(product(range(space.num_devices), repeat=p.count) for p in pieces)):
        devices = tuple(sorted({d for each in maps for d in each}))
        holding = index.get(Holding(devices))
        if holding is not None and allowed[holding]:
            counts = tuple(tuple(each.count(d) for d in range(space.num_devices)) for each in maps)
            yield _priced(space, kind, holding, counts, embedding)


def by_milp(space: Space, *, time_limit_s: float = 60.0) -> Found | None:
    """A mixed-integer program over options and pairs of options, by HiGHS.

    Variables: y of each sub-block's option, z of each pair of holdings that follow each other, and for each sub-block
    and device the time at which it begins; c_j >= f_i + crossing_ij(z) is linear in z, absent messages weigh -M.
    """
    best: Found | None = None
    for embedding in space.embeddings:
        found = _milp(space, embedding, time_limit_s)
        if found is not None and (best is None or found.tpot_s < best.tpot_s):
            best = found
    return best


def _milp(space: Space, embedding: int, time_limit_s: float) -> Found | None:
    known = [options(space, k, embedding=embedding) for k in space.kinds]
    num_devices, stages, holdings = space.num_devices, len(known), len(space.holdings)
    scale = 1 / max(max(float(o.work_s.sum()) for o in each) for each in known)
    big = scale * (sum(max(float(o.work_s.max()) for o in each) for each in known) + _longest(space) * (stages + 2))
    y0 = np.concatenate([[0], np.cumsum([len(k) for k in known])])
    z0 = int(y0[-1])
    c0 = z0 + (stages - 1) * holdings * holdings
    last = c0 + stages * num_devices
    rows: list[tuple[list[int], list[float], float, float]] = []

    def y(stage: int, option: int) -> int:
        return int(y0[stage]) + option

    def z(stage: int, a: int, b: int) -> int:
        return z0 + (stage * holdings + a) * holdings + b

    def c(stage: int, device: int) -> int:
        return c0 + stage * num_devices + device

    upper = np.ones(last + 1)
    upper[c0:] = np.inf
    for s, each in enumerate(known):
        rows.append(([y(s, o) for o in range(len(each))], [1.0] * len(each), 1.0, 1.0))
        for h in range(holdings):
            mine = [(y(s, i), 1.0) for i, o in enumerate(each) if o.holding == h]
            for pairs in (
                [z(s, h, b) for b in range(holdings)] if s < stages - 1 else None,
                [z(s - 1, a, h) for a in range(holdings)] if s else None,
            ):
                if pairs is not None:
                    both = mine + [(v, -1.0) for v in pairs]
                    rows.append(([v for v, _ in both], [w for _, w in both], 0.0, 0.0))
    for d in range(num_devices):
        held = [(y(s, i), o.held_bytes[d]) for s, each in enumerate(known) for i, o in enumerate(each)]
        free = space.memory_bytes[d] - (space.table_bytes if d == embedding else 0.0)
        size = max(space.memory_bytes[d], 1.0)
        rows.append(([v for v, _ in held], [w / size for _, w in held], -np.inf, free / size))

    def finish(stage: int, device: int) -> list[tuple[int, float]]:
        work = [(y(stage, i), -scale * float(o.work_s[device])) for i, o in enumerate(known[stage])]
        return [(c(stage, device), -1.0), *work]

    entry, out = space.entry_s, space.exit_s
    for s in range(stages):
        for j in range(num_devices):
            if not s:
                terms = [
                    (y(0, i), -_weight(float(entry[embedding, o.holding, j]), scale, big))
                    for i, o in enumerate(known[0])
                ]
                rows.append(([c(0, j), *[v for v, _ in terms]], [1.0, *[w for _, w in terms]], 0.0, np.inf))
                continue
            table = space.crossing_s(space.kinds[s])
            for i in range(num_devices):
                terms = [(c(s, j), 1.0), *finish(s - 1, i)]
                for a in range(holdings):
                    for b in range(holdings):
                        terms.append((z(s - 1, a, b), -_weight(float(table[a, b, i, j]), scale, big)))
                rows.append(([v for v, _ in terms], [w for _, w in terms], 0.0, np.inf))
                for a in range(holdings):
                    for b in range(holdings):
                        if table[a, b, i, j] >= MISSING_S / 2:
                            upper[z(s - 1, a, b)] = 0.0
    for i in range(num_devices):
        terms = [(last, 1.0), *finish(stages - 1, i)]
        for k, o in enumerate(known[-1]):
            value = float(out[o.holding, i, embedding])
            terms.append((y(stages - 1, k), -_weight(value, scale, big)))
            if value >= MISSING_S / 2:
                upper[y(stages - 1, k)] = 0.0
        joined: dict[int, float] = {}
        for v, w in terms:
            joined[v] = joined.get(v, 0.0) + w
        rows.append((list(joined), list(joined.values()), 0.0, np.inf))
    at = [(r, v, w) for r, (vs, ws, _, _) in enumerate(rows) for v, w in zip(vs, ws, strict=True)]
    matrix = coo_array(([w for _, _, w in at], ([r for r, _, _ in at], [v for _, v, _ in at])), (len(rows), last + 1))
    goal = np.zeros(last + 1)
    goal[last] = 1.0
    integer = np.zeros(last + 1)
    integer[:z0] = 1
    integer[z0:c0] = 1
    solved = milp(
        goal,
        constraints=LinearConstraint(matrix.tocsr(), [r[2] for r in rows], [r[3] for r in rows]),
        bounds=Bounds(0.0, upper),
        integrality=integer,
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-9},
    )
    if solved.x is None:
        return None
    path = []
    for s, each in enumerate(known):
        o = each[int(np.argmax(solved.x[y0[s] : y0[s + 1]]))]
        path.append((o.holding, o.counts))
    return Found(tpot_s=float(solved.x[last]) / scale, path=tuple(path), embedding=embedding)


def _weight(seconds: float, scale: float, big: float) -> float:
    return max(-big, scale * seconds) if seconds < MISSING_S / 2 else 0.0


def _longest(space: Space) -> float:
    tables = (space.crossing_s("attention"), space.entry_s, space.exit_s)
    finite = [t[np.isfinite(t) & (t < MISSING_S / 2)] for t in tables]
    return max(float(t.max(initial=0.0)) for t in finite)
