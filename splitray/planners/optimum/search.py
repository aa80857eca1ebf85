"""A beam over the sub-blocks of a whole model: good placements, with their true clocks, and no promise.

A label is the time at which each device has finished its part, the bytes it holds, and the steps that led there. The
shares of a partitioned sub-block are poured like water: pieces go where they are done first, given the clocks, or
so that devices finish as far apart as in the best steady rhythm of two holdings that take turns. The bound of bound.py
says how far from the optimum the result can be.

Shapes: K labels, D devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.planners.optimum.enumerate import Found, Step
from splitray.planners.optimum.rhythm import steady
from splitray.planners.optimum.space import MISSING_S, Kind, Pieces, Space


@dataclass(slots=True)
class _Labels:
    """Labels whose last sub-block was done by one holding; `parent` points into the labels of the stage before."""

    finish: Floats  # [K, D]
    held: Floats  # [K, D]
    parent: Ints  # [K]
    counts: list[Ints]  # of each part, [K, D]

    def take(self, rows: Ints) -> _Labels:
        return _Labels(self.finish[rows], self.held[rows], self.parent[rows], [c[rows] for c in self.counts])


def beam(
    space: Space,
    *,
    width: int,
    holdings: Mapping[Kind, Sequence[int]] | None = None,
    pairs: Iterable[tuple[int, int]] = (),
    embeddings: Sequence[int] | None = None,
    price_s_per_byte: Floats | None = None,
) -> Found | None:
    """The quickest placement found, or None where no label lived to the end.

    Args:
        space: what may be chosen.
        width: labels kept for each holding after each sub-block.
        holdings: those to try for each kind of sub-block, all by default.
        pairs: of holdings of attention and FFN, whose steady rhythm is a further way to share them.
        embeddings: holdings of the embedding to try, all by default.
        price_s_per_byte: what memory costs while labels are ranked, [D]; scarce memory is then kept for later.
    """
    price = np.zeros(space.num_devices) if price_s_per_byte is None else price_s_per_byte
    best: Found | None = None
    partners: dict[tuple[Kind, int], list[int]] = {}
    for a, f in pairs:
        partners.setdefault((space.kinds[0], a), []).append(f)
        partners.setdefault((space.kinds[1], f), []).append(a)
    for embedding in space.embeddings if embeddings is None else embeddings:
        found = _from(space, embedding, width, price, holdings, partners)
        if found is not None and (best is None or found.tpot_s < best.tpot_s):
            best = found
    return best


def _from(
    space: Space,
    embedding: int,
    width: int,
    price: Floats,
    holdings: Mapping[Kind, Sequence[int]] | None,
    partners: Mapping[tuple[Kind, int], Sequence[int]],
) -> Found | None:
    d = space.num_devices
    held0 = space.table_on[embedding] * space.table_bytes
    if (held0 > space.memory_bytes).any():
        return None
    history: list[list[tuple[int, _Labels]]] = []
    finish, held, at = np.zeros((1, d)), held0[None], np.zeros(1, int)
    potentials = [_potential(space, h.devices) for h in space.holdings]
    for stage, kind in enumerate(space.kinds):
        allowed = np.flatnonzero(space.allowed(kind)) if holdings is None else holdings[kind]
        table = space.crossing_s(kind) if stage else None
        free = space.free_rows(kind, embedding)
        grown: list[tuple[int, _Labels]] = []
        for target in allowed:
            space.deadline.check()
            way = space.entry_s[embedding, target][None, None] if table is None else table[at, target]
            came = np.max((finish[:, :, None] if table is not None else np.zeros((1, 1, 1))) + way, axis=1)
            labels = _shared(space, kind, int(target), came, held, free, partners.get((kind, int(target)), ()))
            if labels is None:
                continue
            score = labels.finish @ potentials[target] + labels.held @ price
            keep = np.argsort(score, kind="stable")
            keep = keep[_distinct(labels.finish[keep], labels.held[keep])][:width]
            grown.append((int(target), labels.take(keep)))
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


def _distinct(finish: Floats, held: Floats) -> Bools:
    """The first of labels that are the same, [K]."""
    keys = np.round(np.concatenate([np.where(np.isfinite(finish), finish, 0) * 1e9, held], axis=1)) + 0.0  # no -0
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(key.tobytes(), i) == i for i, key in enumerate(keys)], bool)


def _shared(
    space: Space,
    kind: Kind,
    target: int,
    came: Floats,
    held: Floats,
    free: Bools,
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
        slacks += [s for partner in partners for s in [_slack_s(space, kind, target, partner)] if s is not None]
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


def _slack_s(space: Space, kind: Kind, target: int, partner: int) -> Floats | None:
    """How much later than the others each device finishes a sub-block in the best rhythm with a partner, [devices]."""
    first = kind == space.kinds[0]
    pair = (target, partner) if first else (partner, target)
    if pair not in space.rhythms:
        found = steady(space, *pair)
        space.rhythms[pair] = None if found is None else found.slack_s
    slacks = space.rhythms[pair]
    return None if slacks is None else slacks[0 if first else 1]


def pour(offset: Floats, part: Pieces, devices: list[int], room: Floats) -> Ints:
    """Whole pieces for each device, [K, len(devices)], so that the last to finish finishes first; each gets one.

    The water stands at the level at which real shares add up to all pieces. What rounding leaves is given one by one
    to where it is done first. Fewer pieces than there are come back where room is short.
    """
    each, total = part.piece_s[devices], part.count
    offset = np.minimum(offset, MISSING_S / 1e9)  # beyond reach: whatever it gets, the step costs MISSING_S
    least = np.minimum(1.0, room)
    level = (total + (offset / each).sum(1)) / (1 / each).sum()
    counts = np.floor((level[:, None] - offset) / each)
    dry = counts < least
    while dry.any():  # they get the least, which lowers the level for the others
        left = np.where(dry, 0.0, 1 / each)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = (total - (least * dry).sum(1) + (offset * left).sum(1)) / left.sum(1)
        counts = np.where(dry, least, np.floor((level[:, None] - offset) / each))
        below = counts < least
        if not below.any():
            break
        dry |= below
    if (counts > room).any():
        level = _level(offset, each, least, room, total)
        counts = np.clip(np.floor((level[:, None] - offset) / each), least, room)
    rows = np.arange(len(offset))
    missing = total - counts.sum(1)
    while (missing > 0).any():
        done = np.where(counts < room, offset + (counts + 1) * each, np.inf)
        best = done.argmin(1)
        give = (missing > 0) & np.isfinite(done[rows, best])
        if not give.any():
            break
        counts[rows, best] += give
        missing = missing - give
    return counts.astype(np.int64)


def _level(offset: Floats, each: Floats, least: Floats, room: Floats, total: int) -> Floats:
    """Where the water stands if every share has its limits, [K]: read off between the corners."""
    corners = np.sort(np.concatenate([offset + least * each, offset + room * each], axis=1), axis=1)  # [K, C]
    under = np.clip((corners[..., None] - offset[:, None]) / each, least[:, None], room[:, None]).sum(2)
    rows = np.arange(len(offset))
    above = np.minimum((under < total).sum(1), corners.shape[1] - 1)
    below = np.maximum(above - 1, 0)
    rise = under[rows, above] - under[rows, below]
    part_way = np.clip((total - under[rows, below]) / np.where(rise > 0, rise, 1.0), 0.0, 1.0)
    return corners[rows, below] + part_way * (corners[rows, above] - corners[rows, below])
