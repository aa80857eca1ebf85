"""A beam over the sub-blocks of a whole model: good placements, with their true clocks, and no promise.

A label is the time at which each device has finished its part, the bytes it holds, and the steps that led there. The
shares of a partitioned sub-block are poured like water: pieces go where they are done first, given the clocks, or
so that devices finish as far apart as in the best steady rhythm of two holdings that take turns. The bound of bound.py
says how far from the optimum the result can be.

Shapes: K labels, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from splitray.planners.optimum.enumerate import Found, Step
from splitray.planners.optimum.space import MISSING_S, Floats, Kind, Pieces, Space

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Labels:
    """Labels whose last sub-block was done by one holding; `parent` points into the labels of the stage before."""

    finish: Floats  # [K, D]
    held: Floats  # [K, D]
    parent: Ints  # [K]
    counts: list[Ints]  # of each part, [K, D]


def beam(
    space: Space,
    *,
    width: int,
    holdings: Mapping[Kind, Ints] | None = None,
    embeddings: Sequence[int] | None = None,
    price_s_per_byte: Floats | None = None,
) -> Found | None:
    """The quickest placement found, or None where no label lived to the end.

    Args:
        space: what may be chosen.
        width: labels kept for each holding after each sub-block.
        holdings: those to try for each kind of sub-block, all by default.
        embeddings: devices to try for the embedding, all by default.
        price_s_per_byte: what memory costs while labels are ranked, [D]; scarce memory is then kept for later.
    """
    price = np.zeros(space.num_devices) if price_s_per_byte is None else price_s_per_byte
    best: Found | None = None
    for embedding in space.embeddings if embeddings is None else embeddings:
        found = _from(space, embedding, width, price, holdings)
        if found is not None and (best is None or found.tpot_s < best.tpot_s):
            best = found
    return best


def _from(
    space: Space, embedding: int, width: int, price: Floats, holdings: Mapping[Kind, Ints] | None
) -> Found | None:
    d = space.num_devices
    held0 = np.where(np.arange(d) == embedding, space.table_bytes, 0.0)
    if (held0 > space.memory_bytes).any():
        return None
    history: list[list[tuple[int, _Labels]]] = []
    finish, held, at = np.zeros((1, d)), held0[None], np.zeros(1, int)
    partners = _partners(space, holdings)
    potentials = [_potential(space, h.devices) for h in space.holdings]
    for stage, kind in enumerate(space.kinds):
        allowed = np.flatnonzero(space.allowed(kind)) if holdings is None else holdings[kind]
        table = space.crossing_s(kind) if stage else None
        free = space.free_rows(kind, embedding)
        grown: list[tuple[int, _Labels]] = []
        for target in allowed:
            way = space.entry_s[embedding, target][None, None] if table is None else table[at, target]
            came = np.max((finish[:, :, None] if table is not None else np.zeros((1, 1, 1))) + way, axis=1)
            labels = _shared(space, kind, int(target), came, held, free, partners.get((kind, int(target)), ()))
            if labels is None:
                continue
            score = labels.finish @ potentials[target] + labels.held @ price
            keep = np.argsort(score, kind="stable")
            keep = keep[_distinct(labels.finish[keep], labels.held[keep])][:width]
            grown.append((int(target), _take(labels, keep)))
        if not grown:
            return None
        history.append(grown)
        finish = np.concatenate([x.finish for _, x in grown])
        held = np.concatenate([x.held for _, x in grown])
        at = np.concatenate([np.full(len(x.finish), t) for t, x in grown])
    seconds = np.max(finish + space.exit_s[at, :, embedding], axis=1)
    row = int(seconds.argmin())
    if seconds[row] >= MISSING_S / 2:
        return None
    steps: list[Step] = []
    end = float(seconds[row])
    for grown in reversed(history):
        for target, labels in grown:
            if row < len(labels.parent):
                steps.append((target, tuple(tuple(map(int, c[row])) for c in labels.counts)))
                row = int(labels.parent[row])
                break
            row -= len(labels.parent)
    return Found(tpot_s=end, path=tuple(reversed(steps)), embedding=embedding)


def _potential(space: Space, devices: tuple[int, ...]) -> Floats:
    """How much each device's clock weighs when labels are ranked: in proportion to speed, [D]."""
    weight = np.full(space.num_devices, 1e-6)
    weight[list(devices)] = space.rates.bytes_per_s[0][list(devices)]
    return weight / weight.sum()


def _distinct(finish: Floats, held: Floats) -> NDArray[np.bool_]:
    """The first of labels that are the same, [K]."""
    keys = np.round(np.concatenate([np.where(np.isfinite(finish), finish, 0) * 1e9, held], axis=1))
    _, first = np.unique(keys, axis=0, return_index=True)
    mask = np.zeros(len(keys), bool)
    mask[first] = True
    return mask


def _take(labels: _Labels, rows: Ints) -> _Labels:
    return _Labels(labels.finish[rows], labels.held[rows], labels.parent[rows], [c[rows] for c in labels.counts])


def _shared(
    space: Space,
    kind: Kind,
    target: int,
    came: Floats,
    held: Floats,
    free: NDArray[np.bool_],
    partners: Sequence[int],
) -> _Labels | None:
    """All labels that reach one holding and fit, each in a few ways to share the sub-block."""
    holding = space.holdings[target]
    devices, d = list(holding.devices), space.num_devices
    able = came[:, devices].max(1) < MISSING_S / 2
    parents = np.flatnonzero(able)
    if not len(parents):
        return None
    slacks = [np.zeros(len(devices))]
    if holding.partitioned and kind in space.kinds[:2]:
        slacks += [s for partner in partners for s in [steady_slack_s(space, kind, target, partner)] if s is not None]
    found: list[_Labels] = []
    for slack in slacks:
        clock = np.where(np.isfinite(came[parents]), came[parents], 0.0)
        finish, total, counts = came[parents].copy(), held[parents].copy(), []
        finish[:, devices] += space.launch_s[devices]
        fits = np.ones(len(parents), bool)
        for part in space.pieces(kind):
            bytes_each = np.where(free, 0.0, part.piece_bytes)
            if not holding.partitioned:
                share = np.zeros((len(parents), d), int)
                share[:, devices] = part.count
            else:
                offset = finish[:, devices] - slack
                with np.errstate(divide="ignore", invalid="ignore"):
                    room = np.floor((space.memory_bytes - total)[:, devices] / bytes_each[devices])
                room = np.where(bytes_each[devices] > 0, room, part.count)
                poured = pour(offset, part, devices, np.clip(room, 0, part.count))
                share = np.zeros((len(parents), d), int)
                share[:, devices] = poured
                fits &= (poured.sum(1) == part.count) & (poured > 0).all(1)
            finish = finish + share * part.piece_s
            total = total + share * bytes_each
            counts.append(share)
        fits &= (total <= space.memory_bytes).all(1) & (clock.max(1) < MISSING_S / 2)
        rows = np.flatnonzero(fits)
        found.append(_Labels(finish[rows], total[rows], parents[rows], [c[rows] for c in counts]))
    merged = _Labels(
        np.concatenate([x.finish for x in found]),
        np.concatenate([x.held for x in found]),
        np.concatenate([x.parent for x in found]),
        [np.concatenate([x.counts[i] for x in found]) for i in range(len(found[0].counts))],
    )
    return merged if len(merged.finish) else None


def _partners(space: Space, holdings: Mapping[Kind, Ints] | None) -> dict[tuple[Kind, int], list[int]]:
    """For a kind of sub-block and its holding, the holdings that may stand next to it in a steady rhythm."""
    if holdings is None or len(space.kinds) < 3 or space.kinds[1] == space.kinds[0]:
        return {}
    first, second = space.kinds[:2]
    shared = {k: [int(h) for h in holdings[k] if len(space.holdings[h].devices) > 1] for k in (first, second)}
    return {(k, h): shared[o][:4] + [h] for k, o in ((first, second), (second, first)) for h in shared[k]}


def steady_slack_s(space: Space, kind: Kind, target: int, partner: int) -> Floats | None:
    """How much later than the others each device finishes a sub-block in the best rhythm with a partner, [devices]."""
    key = kind, target, partner
    if key not in space.rhythms:
        space.rhythms[key] = _steady_slack_s(space, kind, target, partner)
    return space.rhythms[key]


def _steady_slack_s(space: Space, kind: Kind, target: int, partner: int) -> Floats | None:
    """A linear program: shares as real numbers, and clocks that advance by one period a layer."""
    first, second = space.kinds[:2]
    held = {kind: target, (second if kind == first else first): partner}
    d = space.num_devices
    n_at = {first: 0, second: d}  # shares, then clocks at the beginning of each, then the period
    c_at, period = {first: 2 * d, second: 3 * d}, 4 * d
    rows: list[Floats] = []
    right: list[float] = []
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * (4 * d + 1)
    equal, total = [], []
    for here, there in ((first, second), (second, first)):
        (part,) = space.pieces(here)
        holding, after = space.holdings[held[here]], space.holdings[held[there]]
        table = space.crossing_s(there)[held[here], held[there]]
        for i in range(d):
            low = float(part.count) if not holding.partitioned else min(1.0, part.count)
            bounds[n_at[here] + i] = (low, float(part.count)) if i in holding.devices else (0.0, 0.0)
        if holding.partitioned:
            row = np.zeros(4 * d + 1)
            row[n_at[here] : n_at[here] + d] = 1
            equal.append(row)
            total.append(float(part.count))
        for i in holding.devices:
            for j in after.devices:
                if not np.isfinite(table[i, j]):
                    continue
                if table[i, j] > MISSING_S / 2:
                    return None
                row = np.zeros(4 * d + 1)  # c_there_j >= c_here_i + launch + n g + crossing, less a period at the turn
                row[c_at[here] + i] += 1
                row[n_at[here] + i] += part.piece_s[i]
                row[c_at[there] + j] -= 1
                row[period] = -1.0 if there == first else 0.0
                rows.append(row)
                right.append(-float(table[i, j] + space.launch_s[i]))
    goal = np.zeros(4 * d + 1)
    goal[period] = 1.0
    # Among equals the rhythm that is done early: clocks weigh next to nothing.
    goal[2 * d : 4 * d] = 1e-6
    solved = linprog(
        goal,
        A_ub=np.array(rows),
        b_ub=right,
        A_eq=np.array(equal) if equal else None,
        b_eq=total or None,
        bounds=bounds,
    )
    if solved.status != 0:
        return None
    (part,) = space.pieces(kind)
    devices = list(space.holdings[target].devices)
    n, c = solved.x[n_at[kind] : n_at[kind] + d], solved.x[c_at[kind] : c_at[kind] + d]
    finish = (c + n * part.piece_s + space.launch_s)[devices]
    slack: Floats = finish - finish.min()
    return slack


def pour(offset: Floats, part: Pieces, devices: list[int], room: Floats) -> Ints:
    """Whole pieces for each device, [K, len(devices)], so that the last to finish finishes first; each gets one.

    The level of water gives the bulk; what rounding leaves is given one by one to where it is done first.
    """
    each, total = part.piece_s[devices], part.count
    offset = np.minimum(offset, MISSING_S / 1e9)  # beyond reach: whatever it gets, the step costs MISSING_S
    level = (total + (offset / each).sum(1)) / (1 / each).sum()
    counts = np.clip(np.floor((level[:, None] - offset) / each), np.minimum(1, room), room)
    rows = np.arange(len(offset))
    excess = counts.sum(1) - total
    able = (offset < MISSING_S / 2e9).all(1)
    while (over := able & (excess > 0)).any():  # some would have got less than the one piece that they must have
        last = np.where(counts > 1, offset + counts * each, -np.inf)
        worst = last.argmax(1)
        take = np.minimum(excess, np.maximum(1, np.floor(excess / 2)))
        take = np.minimum(take, counts[rows, worst] - 1) * over
        if not take.any():
            break
        counts[rows, worst] -= take
        excess = excess - take
    missing = total - counts.sum(1)
    while (short := able & (missing > 0)).any():
        done = np.where(counts < room, offset + (counts + 1) * each, np.inf)
        best = done.argmin(1)
        open_ = short & np.isfinite(done[rows, best])
        if not open_.any():
            break
        give = np.minimum(np.maximum(1, np.floor(missing / (4 * len(devices)))), room[rows, best] - counts[rows, best])
        counts[rows, best] += give * open_
        missing = missing - give * open_
    return counts.astype(np.int64)
