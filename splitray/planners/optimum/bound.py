"""A lower bound on the time of a token over every placement of a space, by potentials.

For weights that sum to 1, the weighted mean of the receivers' clocks is at least a weighted mean of the senders'
clocks plus work plus transfers, for any coupling of the two weightings: a maximum is no less than any mean. So each
holding gets a few weightings (each device alone, and one in proportion to speed, which makes every share of a
partitioned sub-block cost the same), and a dynamic program over holdings keeps, for each weighting, the least that any
path can have: the minimum over the holdings before, each bounded by its best weighting. Memory enters by Lagrange
multipliers: a price on bytes less its value on the capacity bounds the constrained problem for any price of 0 or more.
Shares are relaxed to real numbers, so the bound holds for any granularity of columns and rows.

Shapes: P weighted holdings, S holdings, E devices of the embedding, D devices.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.optimize import linprog

from splitray.planners.optimum.space import MISSING_S, Floats, Kind, Space

_NONE = -1e18  # no coupling of these two weightings exists


class Potentials:
    """The bound of one space."""

    def __init__(self, space: Space) -> None:
        """Choose the weightings."""
        self.space = space
        layer_s = sum(
            (p.count * p.piece_s for k in space.kinds[:-1][:2] for p in space.pieces(k)), np.zeros(space.num_devices)
        )
        rows, owner, balanced = [], [], []
        for s, h in enumerate(space.holdings):
            for d in h.devices:
                rows.append(np.eye(space.num_devices)[d])
                owner.append(s)
                balanced.append(False)
            if len(h.devices) > 1:
                fair = np.where(np.isin(np.arange(space.num_devices), h.devices), 1 / layer_s, 0.0)
                rows.append(fair / fair.sum())
                owner.append(s)
                balanced.append(True)
        self.weights = np.array(rows)  # [P, D]
        self.owner = np.array(owner)
        self._balanced = np.array(balanced)
        self._starts = np.searchsorted(self.owner, np.arange(len(space.holdings)))
        self._alone = [np.flatnonzero((self.owner == s) & ~self._balanced) for s in range(len(space.holdings))]

    def lower_bound_s(self, price_s_per_byte: Floats | None = None) -> float:
        """The bound at one price of memory, [D]."""
        space = self.space
        price = np.zeros(space.num_devices) if price_s_per_byte is None else price_s_per_byte
        value = np.full((space.num_devices, len(self.owner)), np.inf)
        entry = np.where(space.entry_s > MISSING_S / 2, MISSING_S, space.entry_s)
        for e in space.embeddings:
            value[e] = np.einsum("pd,pd->p", self.weights, entry[e][self.owner]) + price[e] * space.table_bytes
        first = space.kinds[0]
        work = {k: self._work(k, price) for k in set(space.kinds)}
        value = self._mixed(value + work[first][self._free_rows(first)])
        for kind in space.kinds[1:]:
            step = value[:, :, None] + self._transfer(kind)[None]  # [E, P, P]
            best = np.maximum.reduceat(step, self._starts, axis=1).min(1)
            value = self._mixed(best + work[kind][self._free_rows(kind)])
        way = np.where(np.isfinite(space.exit_s), space.exit_s, _NONE)[self.owner]  # [P, D, E]
        end = value + np.einsum("pd,pde->ep", self.weights, np.where(self.weights[:, :, None] > 0, way, 0.0))
        least = np.maximum.reduceat(end, self._starts, axis=1).min(1)
        return float(least.min() - price @ space.memory_bytes)

    def _free_rows(self, kind: Kind) -> slice:
        return slice(None) if kind == "head" else slice(0, 1)

    def _mixed(self, value: Floats) -> Floats:
        """A balanced weighting is at least the mean of the bounds of its devices."""
        for p in np.flatnonzero(self._balanced):
            alone = self._alone[self.owner[p]]
            mean = value[:, alone] @ self.weights[p][self.weights[p] > 0]
            value[:, p] = np.maximum(value[:, p], mean)
        return value

    def _work(self, kind: Kind, price: Floats) -> Floats:
        """The least that doing a sub-block adds, [E or 1, P]; infinite where a holding may not do it."""
        space, allowed = self.space, self.space.allowed(kind)
        embeddings = range(space.num_devices) if kind == "head" else [0]
        found = np.full((len(embeddings), len(self.owner)), np.inf)
        for row, e in enumerate(embeddings):
            free = space.free_rows(kind, e) if kind == "head" else np.zeros(space.num_devices, bool)
            for p, s in enumerate(self.owner):
                if not allowed[s]:
                    continue
                devices, weights = list(space.holdings[s].devices), self.weights[p]
                total = float(weights @ space.launch_s)
                for part in space.pieces(kind):
                    each = (weights * part.piece_s + np.where(free, 0.0, price * part.piece_bytes))[devices]
                    if space.holdings[s].partitioned:
                        spare = part.count - len(devices)
                        total += each.sum() + spare * each.min() if kind == "attention" else part.count * each.min()
                    else:
                        total += part.count * each.sum()
                found[row, p] = total
        return found

    def _transfer(self, kind: Kind) -> Floats:
        inner = self.space.arch.qk_norm_over_heads and kind == "attention"
        return self._into_attention if inner else self._plain

    @cached_property
    def _plain(self) -> Floats:
        return self._couplings(self.space.crossing_s("ffn"))

    @cached_property
    def _into_attention(self) -> Floats:
        return self._couplings(self.space.crossing_s("attention"))

    def _couplings(self, table: Floats) -> Floats:
        """For each pair of weighted holdings a valid mean of transfer times, [P, P]: independent, or the best one."""
        way = np.where(np.isfinite(table), table, _NONE)
        way = np.where(way > MISSING_S / 2, MISSING_S, way)
        left = np.einsum("pi,psij->psj", self.weights, way[self.owner])
        pairs = np.einsum("qj,pqj->pq", self.weights, left[:, self.owner])
        pairs = np.maximum(pairs, _NONE)
        for p in np.flatnonzero(self._balanced):
            for q in np.flatnonzero(self._balanced):
                a, b = self.space.holdings[self.owner[p]].devices, self.space.holdings[self.owner[q]].devices
                part = way[self.owner[p], self.owner[q]][np.ix_(list(a), list(b))]
                if part.max() < MISSING_S / 2:
                    best = _best_coupling(self.weights[p][list(a)], self.weights[q][list(b)], part)
                    pairs[p, q] = max(pairs[p, q], best)
        return pairs


def _best_coupling(left: Floats, right: Floats, way: Floats) -> float:
    """The greatest mean of `way` over couplings of two weightings."""
    n, m = way.shape
    possible = way.ravel() > _NONE / 2
    solved = linprog(
        -np.where(possible, way.ravel(), 0.0),
        A_eq=np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))]),
        b_eq=np.concatenate([left, right]),
        bounds=[(0.0, 1.0 if p else 0.0) for p in possible],
    )
    return float(-solved.fun) if solved.status == 0 else _NONE
