"""A lower bound on the time of a token over every placement of a space, by potentials.

For weights that sum to 1, the weighted mean of the receivers' clocks is at least a weighted mean of the senders'
clocks plus work plus transfers, for any coupling of the two weightings: a maximum is no less than any mean. So each
holding gets a few weightings, and a dynamic program over holdings keeps, for each weighting, the least that any path
can have: the minimum over the holdings before, each bounded by its best weighting. Any weights are valid. The first
are each device alone, and all in proportion to speed; where the bound is weak, those of the steady rhythm of the two
holdings in question are added (rhythm.py), for which a chain of them costs what it really costs.

Memory enters twice. A price on bytes less its value on the capacity bounds the constrained problem for any price of 0
or more (Lagrange). And the program remembers the set of devices used so far while that set is too small for the model,
since a path must leave it. Shares are relaxed to real numbers, so the bound holds for any granularity of columns.

The embedding on each device alone has a bound of its own; copies on several have one for all sets of them: it enters
and ends as quickly as any of them would, and holds copies where memory costs least. Where that is too weak, each set
is bounded.

Shapes: P weighted holdings, N of them with a set of devices so far, S holdings, R rows for the embedding,
D devices.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, islice

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from splitray.arrays import Bools, Floats
from splitray.planners.optimum.deadline import Deadline
from splitray.planners.optimum.rhythm import steady
from splitray.planners.optimum.space import MISSING_S, Kind, Space

_NONE = -1e18  # no coupling of these two weightings exists
_FORBIDDEN = 1e30  # not inf, which times a weight of 0 is not a number
_MOST_SETS = 24  # sets of devices that are remembered
_REFINED = 12  # rounds of adding weightings

Way = tuple[int, bytes, int, bytes]  # a coupling: holding and weights on either side


class Potentials:
    """The bound of one space."""

    def __init__(self, space: Space, upper_s: float = np.inf) -> None:
        """Choose the first weightings and the sets of devices to remember; `upper_s` is known to be reachable."""
        self.space = space
        layer_s = sum(
            (p.count * p.piece_s for k in space.kinds[:-1][:2] for p in space.pieces(k)), np.zeros(space.num_devices)
        )
        unit = np.eye(space.num_devices)
        self._weightings: list[list[Floats]] = []
        for h in space.holdings:
            fair = unit[list(h.devices)].sum(0) / layer_s
            self._weightings.append([unit[d] for d in h.devices] + ([fair / fair.sum()] if len(h.devices) > 1 else []))
        self._upper = upper_s
        needed = float(space.table_bytes.min()) + sum(  # at least, wherever the pieces are
            p.count * float(np.where(space.shares_table & (k == "head"), 0.0, p.piece_bytes).min())
            for k in space.kinds for p in space.pieces(k)
        )  # fmt: skip
        self._sets = _sets_too_small(space, needed)
        # Where all are too small even without the embedding, a path has to leave them wherever that is.
        room = [space.memory_bytes[list(s)].sum() + space.table_bytes.max() for s in self._sets]
        self._embedding_apart = all(r < needed * (1 - 1e-9) for r in room)
        self._coupled: dict[tuple[bool, Way], float] = {}
        several = [e for e in space.embeddings if space.table_on[e].sum() > 1]
        self._rows = [[e] for e in space.embeddings if e not in several] + ([several] if several else [])
        self._of_row = np.full(len(self._rows), -np.inf)  # the best bound so far of each
        self.weakest: list[tuple[int, int]] = []  # holdings of attention and FFN on the path of the last bound
        self._build()

    @property
    def so_far_s(self) -> float:
        """The best bound that was found so far, -inf before there is any."""
        return float(self._of_row.min())

    def climb_s(self, price_s_per_byte: Floats, upper_s: float) -> float:
        """The best bound found at multiples of a price of memory, [D], with better weightings; at most `upper_s`."""
        self._upper = upper_s
        if not price_s_per_byte.any():
            return self._refined(price_s_per_byte)
        self.lower_bound_s(0 * price_s_per_byte)
        scale, stride = 1.0, 0.5
        value = self.lower_bound_s(price_s_per_byte)
        for _ in range(6):  # concave in the price: climb along its direction
            tried = {s: self.lower_bound_s(s * price_s_per_byte) for s in (scale * (1 + stride), scale / (1 + stride))}
            top = max(tried, key=lambda s: tried[s])
            if tried[top] > value:
                scale, value = top, tried[top]
            else:
                stride /= 2
        return self._refined(scale * price_s_per_byte)

    def _refined(self, price: Floats) -> float:
        known: set[tuple[int, int]] = set()
        for _ in range(_REFINED):
            best = self.lower_bound_s(price)
            pairs = [p for p in dict.fromkeys(self.weakest) if p not in known]
            if not pairs or best >= self._upper:
                break
            for pair in pairs[:4]:
                self.space.deadline.check()
                known.add(pair)
                rhythm = steady(self.space, *pair, price)
                for holding, weights in zip(pair, rhythm.weights if rhythm else (), strict=False):
                    if weights.any():
                        self._weightings[holding].append(weights)
            self._build()
        if len(self._rows[-1]) > 1 and self._of_row[-1] < self._of_row[:-1].min(initial=self._upper):
            self._rows[-1:], least = [[e] for e in self._rows[-1]], self._of_row[-1]
            self._of_row = np.append(self._of_row[:-1], np.full(len(self._rows) - len(self._of_row) + 1, least))
            self.lower_bound_s(price)
        return min(self._upper, float(self._of_row.min()))

    def lower_bound_s(self, price_s_per_byte: Floats | None = None) -> float:
        """The bound at one price of memory, [D], over the embeddings whose best so far is not enough."""
        space = self.space
        price = np.zeros(space.num_devices) if price_s_per_byte is None else price_s_per_byte
        capacity = float(price @ space.memory_bytes)
        rows = [r for r in range(len(self._rows)) if self._of_row[r] < self._upper]
        if not rows:
            return float(self._of_row.min())
        value = np.full((len(rows), len(self._base)), _FORBIDDEN)
        for row, r in enumerate(rows):
            each = self._rows[r]
            entry_s = np.minimum(space.entry_s[each].min(0), MISSING_S)
            entered = np.einsum("nd,nd->n", self._weight, entry_s[self._holding])
            tables = float((space.table_on[each] @ (price * space.table_bytes)).min())
            value[row] = np.where(self._starts_at(each), entered + tables, _FORBIDDEN)
        first = space.kinds[0]
        work = {k: self._work(k, price, [self._rows[r] for r in rows]) for k in set(space.kinds)}
        transfer = {
            k: np.where(self._allowed, self._transfer(k)[np.ix_(self._base, self._base)], _FORBIDDEN)
            for k in set(space.kinds)
        }
        value = self._mixed(value + work[first])
        history = [value]
        onward = {k: [transfer[k][slot] for slot in self._slots] for k in transfer}  # [states, N] each
        for kind in space.kinds[1:]:
            space.deadline.check()
            step = np.full((len(rows), len(self._first), len(self._base)), -np.inf)
            for slot, way in zip(self._slots, onward[kind], strict=True):
                np.maximum(step, value[:, slot, None] + way, out=step)  # a state's best weighting
            value = self._mixed(np.minimum(self._told(step), _FORBIDDEN) + work[kind])
            history.append(value)
        ends = np.stack([space.exit_s[..., self._rows[r]].min(2) for r in rows], axis=2)  # [S, D, R]
        way = np.where(np.isfinite(ends), ends, _NONE)[self._holding]  # [N, D, R]
        out = np.einsum("nd,nde->en", self._weight, np.where(self._weight[:, :, None] > 0, way, 0.0))
        end = np.where(self._complete, np.minimum(value + out, _FORBIDDEN), _FORBIDDEN)
        by_state = np.maximum.reduceat(end, self._first, axis=1)
        least = by_state.min(1) - capacity
        self._of_row[rows] = np.maximum(self._of_row[rows], least)
        row = int(least.argmin())
        self._trace([v[row] for v in history], transfer, end[row])
        return float(least.min())

    def _trace(self, values: list[Floats], transfer: dict[Kind, Floats], end: Floats) -> None:
        """The pairs of shared holdings on the path that attains the bound, the most frequent first."""
        path: list[int] = []
        onward = end
        for i in range(len(values) - 1, -1, -1):
            state = int(np.maximum.reduceat(onward, self._first).argmin())
            mine = np.flatnonzero(self._state == state)
            node = int(mine[onward[mine].argmax()])
            path.append(int(self._holding[node]))
            if i:
                onward = values[i - 1] + transfer[self.space.kinds[i]][:, node]
        path.reverse()
        kinds = self.space.kinds
        if len(kinds) < 3 or kinds[0] == kinds[1]:
            self.weakest = []
            return
        pairs = Counter(
            (path[i], path[i + 1]) if kinds[i] == kinds[0] else (path[i + 1], path[i]) for i in range(len(path) - 2)
        )
        self.weakest = [p for p, _ in pairs.most_common() if any(len(self.space.holdings[h].devices) > 1 for h in p)]

    def _build(self) -> None:
        """Lay out weighted holdings, and each of them once for every remembered set that it can stand in."""
        space, flat = self.space, [(s, w) for s, ws in enumerate(self._weightings) for w in ws]
        self._p_weights = np.array([w for _, w in flat])
        self._p_owner = np.array([s for s, _ in flat])
        self._transfers: dict[bool, Floats] = {}
        free = len(self._sets)
        index = {s: i for i, s in enumerate(self._sets)}
        states = [
            (label, s)
            for label in range(free + 1)
            for s, h in enumerate(space.holdings)
            if label == free or set(h.devices) <= self._sets[label]
        ]
        after = {
            (label, s): free if label == free else index.get(self._sets[label] | set(h.devices), free)
            for label in range(free + 1)
            for s, h in enumerate(space.holdings)
        }
        nodes = [(k, p) for k, (_, s) in enumerate(states) for p in np.flatnonzero(self._p_owner == s)]
        self._state = np.array([k for k, _ in nodes])
        self._base = np.array([p for _, p in nodes])
        self._holding = self._p_owner[self._base]
        self._weight = self._p_weights[self._base]
        self._first = np.searchsorted(self._state, np.arange(len(states)))
        # The k-th weighting of every state, its last one again where it has no more: much faster than reduceat.
        num_weightings = np.bincount(self._state)
        self._slots = [self._first + np.minimum(k, num_weightings - 1) for k in range(num_weightings.max())]
        label = np.array([states[k][0] for k in self._state])
        self._label, self._complete = label, label == free
        leads = np.array([[after[a, s] == b for b, s in states] for a in range(free + 1)])
        self._allowed = leads[label][:, self._state]
        self._index = index
        self._copies = np.flatnonzero([space.holdings[s].replicated for _, s in states])
        holders = np.array([hash(h.devices) for h in space.holdings])
        self._elsewhere = holders[[states[k][1] for k in self._copies]][:, None] != holders[self._holding]
        alone = {
            (k, int(w.argmax())): n
            for n, (k, w) in enumerate(zip(self._state, self._weight, strict=True))
            if w.max() == 1.0
        }
        self._mean = np.zeros((len(nodes), len(nodes)))
        for n, (k, w) in enumerate(zip(self._state, self._weight, strict=True)):
            for d in np.flatnonzero(w):
                self._mean[alone[k, int(d)], n] = w[d]

    def _starts_at(self, embeddings: Sequence[int]) -> Bools:
        """Which nodes may follow one of these holdings of the embedding, [N]."""
        free, found = len(self._sets), np.zeros(len(self._label), bool)
        for e in embeddings:
            table = () if self._embedding_apart else self.space.tables[e].devices
            labels = [self._index.get(frozenset({*table, *h.devices}), free) for h in self.space.holdings]
            found |= self._label == np.array(labels)[self._holding]
        return found

    def _told(self, step: Floats) -> Floats:
        """The least over all states before, [R, N]; `step` [R, states, N] has what each of them lets a node begin at.

        From copies on other devices each device hears from one of them at most, so that a weighting of several follows
        from no weighting of the copies: it is at least the mean of what its devices can have from any such copies.
        """
        least: Floats = step.min(1)
        if not len(self._copies):
            return least
        from_copies = np.where(self._elsewhere, step[:, self._copies], _FORBIDDEN).min(1)
        return np.minimum(least, from_copies @ self._mean)

    def _mixed(self, value: Floats) -> Floats:
        """A weighting is at least the mean of the bounds of its devices alone."""
        return np.maximum(value, np.minimum(value, _FORBIDDEN) @ self._mean)

    def _work(self, kind: Kind, price: Floats, rows: Sequence[Sequence[int]]) -> Floats:
        """The least that doing a sub-block adds, [R or 1, N]; forbidden where a holding may not do it."""
        space, allowed = self.space, self.space.allowed(kind)
        rows = rows if kind == "head" else rows[:1]
        space.deadline.check()
        found = np.full((len(rows), len(self._p_owner)), _FORBIDDEN)
        for row, each in enumerate(rows):
            free = np.any([space.free_rows(kind, e) for e in each], axis=0)
            for p, s in enumerate(self._p_owner):
                if not allowed[s]:
                    continue
                devices, weights = list(space.holdings[s].devices), self._p_weights[p]
                total = float(weights @ space.launch_s)
                for part in space.pieces(kind):
                    each = (weights * part.piece_s + np.where(free, 0.0, price * part.piece_bytes))[devices]
                    if not space.holdings[s].partitioned:
                        total += part.count * each.sum()
                    elif len(space.pieces(kind)) == 1:  # each holder has a piece
                        total += each.sum() + (part.count - len(devices)) * each.min()
                    else:
                        total += part.count * each.min()
                found[row, p] = total
        return found[:, self._base]

    def _transfer(self, kind: Kind) -> Floats:
        """For each pair of weighted holdings a valid mean of transfer times into a sub-block, [P, P]."""
        inner = self.space.arch.qk_norm_over_heads and kind == "attention"
        if inner not in self._transfers:
            self._transfers[inner] = self._couplings(inner)
        return self._transfers[inner]

    def _couplings(self, inner: bool) -> Floats:
        """Independent weightings, or the best coupling where both are shared by several devices."""
        space = self.space
        table = space.crossing_s("attention" if inner else "ffn")
        way = np.minimum(np.where(np.isfinite(table), table, _NONE), MISSING_S)
        left = np.einsum("pi,psij->psj", self._p_weights, way[self._p_owner])
        pairs = np.maximum(np.einsum("qj,pqj->pq", self._p_weights, left[:, self._p_owner]), _NONE)
        mixed = np.flatnonzero(self._p_weights.max(1) < 1.0)
        keys: dict[tuple[int, int], Way] = {}
        for p in mixed:
            space.deadline.check()
            for q in mixed:
                a, b = int(self._p_owner[p]), int(self._p_owner[q])
                if way[a, b].max() >= MISSING_S / 2:
                    continue
                if space.holdings[a].replicated and space.holdings[a].devices != space.holdings[b].devices:
                    pairs[self._p_owner == a, q] = _FORBIDDEN  # see `_told`
                else:
                    keys[int(p), int(q)] = a, self._p_weights[p].tobytes(), b, self._p_weights[q].tobytes()
        new = [(at, k) for at, k in keys.items() if (inner, k) not in self._coupled]
        problems = [(self._p_weights[p], self._p_weights[q], way[k[0], k[2]]) for (p, q), k in new]
        for (_, k), best in zip(new, _best_couplings(problems, space.deadline), strict=True):
            self._coupled[inner, k] = best
        for at, k in keys.items():
            pairs[at] = max(pairs[at], self._coupled[inner, k])
        return pairs


def _sets_too_small(space: Space, needed: float) -> list[frozenset[int]]:
    """Sets of devices whose memory cannot hold so many bytes, small ones first."""
    found: list[frozenset[int]] = []
    rising = np.sort(space.memory_bytes).cumsum()
    for size in range(1, space.num_devices):
        space.deadline.check()
        if rising[size - 1] >= needed * (1 - 1e-9):
            break  # the smallest of this size has room, and so has every larger one
        sets = (
            frozenset(c)
            for c in combinations(range(space.num_devices), size)
            if space.memory_bytes[list(c)].sum() < needed * (1 - 1e-9)
        )
        more = list(islice(sets, _MOST_SETS + 1 - len(found)))
        if len(found) + len(more) > _MOST_SETS:
            break
        found += more
    return found


def _best_couplings(problems: Sequence[tuple[Floats, Floats, Floats]], deadline: Deadline) -> list[float]:
    """For each, the greatest mean of a way [D, D] over the couplings of two weightings [D]: many in one program."""
    found: list[float] = []
    for start in range(0, len(problems), 64):
        deadline.check()
        rows: list[int] = []
        columns: list[int] = []
        right: list[float] = []
        goal: list[float] = []
        owner: list[int] = []
        for k, (left, onto, way) in enumerate(problems[start : start + 64]):
            sides = {("left", i): len(right) + n for n, i in enumerate(np.flatnonzero(left))}
            right += list(left[left > 0])
            sides |= {("onto", j): len(right) + n for n, j in enumerate(np.flatnonzero(onto))}
            right += list(onto[onto > 0])
            for i in np.flatnonzero(left):
                for j in np.flatnonzero(onto):
                    columns += [len(goal), len(goal)]
                    rows += [sides["left", i], sides["onto", j]]
                    goal.append(max(float(way[i, j]), -1e6))
                    owner.append(k)
        matrix = coo_array((np.ones(len(rows)), (rows, columns)), (len(right), len(goal))).tocsr()
        solved = linprog(-np.array(goal), A_eq=matrix, b_eq=right)
        values = np.bincount(owner, solved.x * goal) if solved.status == 0 else np.full(max(owner) + 1, _NONE)
        found += [float(v) for v in values]
    return found
