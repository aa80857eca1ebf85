"""The steady state of a layer whose two sub-blocks keep their holdings: a linear program over shares and clocks.

Shares are real numbers and every clock advances by one period a layer. The solution says how far apart devices should
finish (search.py); its dual prices say how much each device's clock matters, which makes the bound tight (bound.py).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from splitray.arrays import Floats
from splitray.planners.optimum.space import MISSING_S, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How a layer beats in its steady state, where its two sub-blocks keep their holdings (attention, FFN).

    `period_s` of a layer; `slack_s`: how much later than the first of them each device of the holding finishes;
    `weights`: what each device's clock counts, [D], 0 outside the holding and 1 in total.
    """

    period_s: float
    slack_s: tuple[Floats, Floats]
    weights: tuple[Floats, Floats]


def steady(space: Space, attention: int, ffn: int, price_s_per_byte: Floats | None = None) -> Rhythm | None:
    """The rhythm of two holdings with the shortest period, at a price of memory; None where a link is missing."""
    kinds, held = space.kinds[:2], (attention, ffn)
    parts = [space.pieces(kind)[0] for kind in kinds]
    holdings = [space.holdings[h] for h in held]
    d = space.num_devices
    price = np.zeros(d) if price_s_per_byte is None else price_s_per_byte
    # Columns: shares of either sub-block [D], when either begins [D], the period.
    share, begin, period, columns = (0, d), (2 * d, 3 * d), 4 * d, 4 * d + 1
    goal = np.zeros(columns)
    goal[2 * d : 4 * d] = 1e-6  # among equals the rhythm that is done early
    goal[period] = 1.0
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * columns
    rows: list[Floats] = []
    right: list[float] = []
    into: list[tuple[int, int]] = []  # which sub-block on which device a row is about
    equal: list[Floats] = []
    for here, there in ((0, 1), (1, 0)):
        part, holding = parts[here], holdings[here]
        goal[share[here] : share[here] + d] = price * part.piece_bytes
        least = min(1, part.count) if holding.partitioned else part.count
        for i in range(d):
            bounds[share[here] + i] = (least, part.count) if i in holding.devices else (0.0, 0.0)
        if holding.partitioned:
            row = np.zeros(columns)
            row[share[here] : share[here] + d] = 1
            equal.append(row)
        table = space.crossing_s(kinds[there])[held[here], held[there]]
        for i in holding.devices:
            for j in holdings[there].devices:
                if table[i, j] > MISSING_S / 2:
                    return None
                if not np.isfinite(table[i, j]):
                    continue
                # begin[there, j] >= begin[here, i] + work + crossing, less a period at the turn
                row = np.zeros(columns)
                row[begin[here] + i] += 1
                row[share[here] + i] += part.piece_s[i]
                row[begin[there] + j] -= 1
                row[period] = -1.0 if there == 0 else 0.0
                rows.append(row)
                right.append(-float(table[i, j] + space.launch_s[i]))
                into.append((there, j))
    solved = linprog(
        goal,
        A_ub=np.array(rows),
        b_ub=right,
        A_eq=np.array(equal) if equal else None,
        b_eq=[parts[k].count for k in (0, 1) if holdings[k].partitioned] or None,
        bounds=bounds,
    )
    if solved.status != 0:
        return None
    slacks, weights = [], []
    for k in (0, 1):
        devices = list(holdings[k].devices)
        shares, begins = solved.x[share[k] : share[k] + d], solved.x[begin[k] : begin[k] + d]
        finish = (begins + shares * parts[k].piece_s + space.launch_s)[devices]
        slacks.append(finish - finish.min())
        weight = np.zeros(d)
        for (block, device), dual in zip(into, solved.ineqlin.marginals, strict=True):
            weight[device] += max(0.0, -dual) * (block == k)
        weights.append(weight / weight.sum() if weight.sum() > 0 else weight)
    return Rhythm(period_s=float(solved.x[period]), slack_s=(slacks[0], slacks[1]), weights=(weights[0], weights[1]))
