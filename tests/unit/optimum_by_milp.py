"""The optimum of small instances as a mixed-integer program, by HiGHS: an oracle for the searches of planners/optimum.

For each sub-block one binary variable an option (holding and counts), for each pair of neighbours one a pair of
holdings, and for each sub-block and device the time at which it begins. What a boundary demands, begin_j >= finish_i +
crossing[i, j], is linear in those; an absent message weighs so little that it demands nothing, and a missing link
forbids the variable that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from splitray.arrays import Floats
from splitray.planners.optimum.enumerate import Found, Option, options
from splitray.planners.optimum.space import MISSING_S, Space

Terms = Sequence[tuple[int, float]]  # variable, coefficient


def by_milp(space: Space, *, embeddings: Sequence[int] | None = None, time_limit_s: float = 60.0) -> Found | None:
    """The best path over some holdings of the embedding, all by default; None if none fits."""
    some = space.embeddings if embeddings is None else embeddings
    found = [_with_embedding(space, e, time_limit_s) for e in some]
    return min((f for f in found if f is not None), key=lambda f: f.tpot_s, default=None)


class _Program:
    """Variables of 0 or more with upper bounds, and rows over them."""

    def __init__(self) -> None:
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[Terms, float, float]] = []

    def binaries(self, count: int) -> range:
        """New variables of 0 or 1."""
        return self._new(count, 1.0, True)

    def numbers(self, count: int) -> range:
        """New variables of 0 or more."""
        return self._new(count, np.inf, False)

    def _new(self, count: int, upper: float, integer: bool) -> range:
        first = len(self._upper)
        self._upper += [upper] * count
        self._integer += [integer] * count
        return range(first, first + count)

    def forbid(self, variable: int) -> None:
        """Keep a variable at 0."""
        self._upper[variable] = 0.0

    def require(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> None:
        """A row: low <= sum of the terms <= high. A variable may stand in several terms."""
        self._rows.append((list(terms), low, high))

    def minimise(self, variable: int, time_limit_s: float) -> Floats | None:
        """The values of all variables where this one is least, None where nothing is feasible."""
        at = [(row, v, w) for row, (terms, _, _) in enumerate(self._rows) for v, w in terms]
        rows, columns, weights = zip(*at, strict=True)
        matrix = coo_array((weights, (rows, columns)), (len(self._rows), len(self._upper))).tocsr()
        goal = np.zeros(len(self._upper))
        goal[variable] = 1.0
        solved = milp(
            goal,
            constraints=LinearConstraint(
                matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows]
            ),
            bounds=Bounds(0.0, self._upper),
            integrality=np.array(self._integer, int),
            options={"time_limit": time_limit_s, "mip_rel_gap": 1e-9},
        )
        values: Floats | None = solved.x
        return values


def _with_embedding(space: Space, embedding: int, time_limit_s: float) -> Found | None:
    known = [options(space, k, embedding=embedding) for k in space.kinds]
    program, devices, holdings = _Program(), range(space.num_devices), range(len(space.holdings))
    takes = [program.binaries(len(each)) for each in known]
    pairs = [program.binaries(len(holdings) ** 2) for _ in known[1:]]
    begins = [program.numbers(space.num_devices) for _ in known]
    (end,) = program.numbers(1)

    def pair(stage: int, before: int, after: int) -> int:
        return pairs[stage][before * len(holdings) + after]

    for stage, each in enumerate(known):
        program.require([(v, 1.0) for v in takes[stage]], 1.0, 1.0)
        for h in holdings:
            mine = [(v, 1.0) for v, o in zip(takes[stage], each, strict=True) if o.holding == h]
            if stage:
                program.require(mine + [(pair(stage - 1, b, h), -1.0) for b in holdings], 0.0, 0.0)
            if stage < len(pairs):
                program.require(mine + [(pair(stage, h, a), -1.0) for a in holdings], 0.0, 0.0)
    for d in devices:
        size = float(space.memory_bytes[d])
        taken = float(space.table_bytes[d]) if space.table_on[embedding, d] else 0.0
        terms = [
            (v, o.held_bytes[d] / size)
            for each, vs in zip(known, takes, strict=True)
            for v, o in zip(vs, each, strict=True)
        ]
        program.require(terms, -np.inf, (size - taken) / size)

    scale, absent = _scales(space, known)

    def way(variable: int, seconds: float) -> tuple[int, float]:
        if seconds >= MISSING_S / 2:
            program.forbid(variable)
            return variable, 0.0
        return variable, -max(absent, scale * seconds)

    def finish(stage: int, device: int) -> list[tuple[int, float]]:
        work = [(v, -scale * float(o.work_s[device])) for v, o in zip(takes[stage], known[stage], strict=True)]
        return [(begins[stage][device], -1.0), *work]

    for j in devices:
        ways = [way(v, space.entry_s[embedding, o.holding, j]) for v, o in zip(takes[0], known[0], strict=True)]
        program.require([(begins[0][j], 1.0), *ways], 0.0, np.inf)
    for stage in range(1, len(known)):
        table = space.crossing_s(space.kinds[stage])
        for i in devices:
            for j in devices:
                ways = [way(pair(stage - 1, a, b), table[a, b, i, j]) for a in holdings for b in holdings]
                program.require([(begins[stage][j], 1.0), *finish(stage - 1, i), *ways], 0.0, np.inf)
    for i in devices:
        ways = [way(v, space.exit_s[o.holding, i, embedding]) for v, o in zip(takes[-1], known[-1], strict=True)]
        program.require([(end, 1.0), *finish(len(known) - 1, i), *ways], 0.0, np.inf)
    values = program.minimise(end, time_limit_s)
    if values is None:
        return None
    best = [each[int(values[list(vs)].argmax())] for each, vs in zip(known, takes, strict=True)]
    path = tuple((o.holding, o.counts) for o in best)
    # Its own clocks, as the program's are only as exact as HiGHS's tolerance of 1e-6.
    return Found(tpot_s=space.seconds(path, embedding), path=path, embedding=embedding)


def _scales(space: Space, known: Sequence[Sequence[Option]]) -> tuple[float, float]:
    """What seconds are multiplied by, so that HiGHS sees numbers near 1, and a weight below any sum of them."""
    longest = [max(float(o.work_s.max()) for o in each) for each in known]
    tables = (space.crossing_s("attention"), space.entry_s, space.exit_s)
    ways = [float(t[np.isfinite(t) & (t < MISSING_S / 2)].max(initial=0.0)) for t in tables]
    scale = 1 / max(max(longest), max(ways))
    return scale, -scale * (sum(longest) + max(ways) * (len(known) + 2))
