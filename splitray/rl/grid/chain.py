"""The cheapest chain of variants through all groups, and one that fits where memory binds. Knows no model, no rates.

Shapes: N instances (last), G groups, V variants, 3 states between groups (the
FFN before was on the edge, on the cloud, on both), E and D devices of embedding and head, K paths to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitray.arrays import Bools, Floats, Ints

_ROUNDS = 6  # of pricing bytes; the slopes converge in three to five
_CHANGES = 6  # of one group each, after that


def along(values: NDArray[Any], index: Ints, axis: int) -> NDArray[Any]:
    """`np.take_along_axis`, which spends most of its time on the other axes' indices: they are kept here."""
    around = _around(index.shape, values.shape, axis)
    return values[(*around[:axis], index, *around[axis + 1 :])]


@lru_cache(maxsize=256)
def _around(index: tuple[int, ...], values: tuple[int, ...], axis: int) -> tuple[Ints, ...]:
    """The indices of every axis, as in `np.take_along_axis`: an axis of length 1 is the same everywhere."""
    shape = [v if i == 1 else i for i, v in zip(index, values, strict=True)]
    return np.ix_(*(np.zeros(n, np.int64) if v == 1 else np.arange(n) for n, v in zip(shape, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Path:
    """A variant of each group, [G, N], and the devices of embedding and head, [N]."""

    variant: Ints
    embedding: Ints
    head: Ints

    def take(self, rows: Ints) -> Path:
        """A copy of the instances `rows`."""
        return Path(self.variant[:, rows], self.embedding[rows], self.head[rows])

    def put(self, rows: Ints, other: Path) -> None:
        """Overwrite the instances `rows` by `other`, in place."""
        self.variant[:, rows], self.embedding[rows], self.head[rows] = other.variant, other.embedding, other.head

    def where(self, here: Bools, other: Path) -> Path:
        """This path for the instances `here`, the other one elsewhere."""
        return Path(
            np.where(here, self.variant, other.variant),
            np.where(here, self.embedding, other.embedding),
            np.where(here, self.head, other.head),
        )


@dataclass(frozen=True, slots=True)
class Chains:
    """What each variant costs after each state, what it holds, and what beginning and ending cost."""

    cost: Floats  # [G, 3, V, N]
    apart: Floats  # [G or 1, 3, V, N]: 0 where a variant leaves this state, infinite elsewhere
    start: Floats  # [E, 3, N]
    end: Floats  # [E, 3, D, N]
    state: Ints  # [G, V, N]: what a variant leaves
    held: Floats  # [2, G, V, N], bytes on each device
    ends: Floats  # [2, E, D], bytes on each device

    def take(self, rows: Ints) -> Chains:
        """A copy of the instances `rows`."""
        last = (..., rows)
        return Chains(
            self.cost[last], self.apart[last], self.start[last], self.end[last], self.state[last], self.held[last],
            self.ends,
        )  # fmt: skip

    def priced(self, price: Floats) -> Chains:
        """The same chains with a price on the bytes held on each device, [2, N], added to the costs."""
        at_ends = (self.ends[..., None] * price[:, None, None]).sum(0)  # [E, D, N]
        return Chains(
            self.cost + (self.held * price[:, None, None]).sum(0)[:, None], self.apart, self.start,
            self.end + at_ends[:, None], self.state, self.held, self.ends,
        )  # fmt: skip

    def best(self) -> Path:
        """The cheapest path of each instance."""
        groups, n = len(self.cost), self.cost.shape[-1]
        g, rows = np.arange(groups)[:, None], np.arange(n)
        step = (self.cost[:, :, None] + self.apart[:, None]).min(3)  # [G, before, after, N]
        value, came = self.start, []
        for each in step:
            total = value[:, :, None] + each  # [E, before, after, N]
            came.append(total.argmin(1))
            value = total.min(1)
        last = value[:, :, None] + self.end  # [E, 3, D, N]
        embedding, state, head = np.unravel_index(last.reshape(-1, n).argmin(0), last.shape[:3])
        states = [state]
        for back in reversed(came):
            states.append(back[embedding, states[-1], rows])
        before, after = np.array(states[:0:-1]), np.array(states[-2::-1])  # of each group, [G, N]
        ways = self.cost[g, before, :, rows] + self.apart[g if len(self.apart) > 1 else 0, after, :, rows]  # [G, N, V]
        return Path(ways.argmin(2), embedding.astype(np.int64), head.astype(np.int64))

    def bytes(self, path: Path) -> Floats:
        """Bytes of a path on each device, [2, N]."""
        chosen = along(self.held, path.variant[None, :, None], axis=2)[:, :, 0].sum(1)
        return chosen + self.ends[:, path.embedding, path.head]

    def value(self, path: Path) -> Floats:
        """Cost of a path for each instance, [N]."""
        costs = self.values(path.variant[None])[0]
        return costs[path.embedding, path.head, np.arange(costs.shape[-1])]

    def values(self, variants: Ints) -> Floats:
        """What paths of variants [K, G, N] cost with either end on either device, [K, E, D, N]."""
        groups, n = len(self.cost), self.cost.shape[-1]
        g, rows = np.arange(groups)[:, None], np.arange(n)
        after = self.state[g, variants, rows]  # [K, G, N]
        inner = self.cost[g[1:], after[:, :-1], variants[:, 1:], rows].sum(1)
        begin = self.cost[0][:2, variants[:, 0], rows].transpose(1, 0, 2)  # [K, E, N]: the state is the embedding's
        begin = begin + self.start[[0, 1], [0, 1]]
        finish = self.end[:, after[:, -1], :, rows].transpose(0, 2, 3, 1)  # [K, E, D, N]
        return inner[:, None, None] + begin[:, :, None] + finish


def within(chains: Chains, free: Path, room: Floats, edge: int, cloud: int) -> Path:
    """Paths that fit into `room` [2, N], where the cheapest paths `free` do not.

    The bytes of the device that overflows are priced by the slope between a path that fits and one that does not,
    until no path lies below that line. As a line's ends may lie far apart, what is between them is tried too: groups
    up to some point from one, those after it from the other, and every cut between the devices.

    `edge` and `cloud` are the variants of whole layers there.

    Returns:
        The cheapest found that fits, else all on the cloud, else on the edge; on the cloud where nothing fits.
    """
    n = room.shape[1]
    rows = np.arange(n)
    side = (chains.bytes(free) - room).argmax(0)
    here = np.arange(2)[:, None] == side
    over = free
    cost_over, bytes_over = chains.value(over), chains.bytes(over)[side, rows]
    smallest = chains.held[chains.held > 0].min()
    fits = chains.priced(here * (10 * (np.abs(cost_over) + 1) / smallest)).best()  # as few bytes there as can be
    cost_fits, bytes_fits = chains.value(fits), chains.bytes(fits)[side, rows]
    for _ in range(_ROUNDS):
        slope = np.maximum(0.0, cost_fits - cost_over) / np.maximum(1.0, bytes_over - bytes_fits)
        found = chains.priced(here * slope).best()
        cost, held = chains.value(found), chains.bytes(found)[side, rows]
        gained = cost_fits + slope * bytes_fits - (cost + slope * held) > 1e-9 * np.abs(cost_fits)
        if not gained.any():
            break
        less = gained & (held <= room[side, rows])
        more = gained & ~less
        fits, over = found.where(less, fits), found.where(more, over)
        cost_fits, bytes_fits = np.where(less, cost, cost_fits), np.where(less, held, bytes_fits)
        cost_over, bytes_over = np.where(more, cost, cost_over), np.where(more, held, bytes_over)
    return _between(chains, fits, over, room, edge, cloud)


def _between(chains: Chains, fits: Path, over: Path, room: Floats, edge: int, cloud: int) -> Path:
    """The cheapest that fits of all that changes from one path to another at some group."""
    groups, n = fits.variant.shape
    early = np.arange(groups)[None, :, None] < np.arange(groups + 1)[:, None, None]  # [K, G, 1]
    pairs = ((fits.variant, over.variant), (over.variant, fits.variant), (edge, cloud), (cloud, edge))
    tried = [np.broadcast_to(np.where(early, a, b), (groups + 1, groups, n)) for a, b in pairs]
    variants = np.concatenate(tried)
    cost = chains.values(variants)  # [K, E, D, N]
    g, rows = np.arange(groups)[:, None], np.arange(n)
    held = chains.held[:, g, variants, rows].sum(2)  # [2, K, N]
    total = held[:, :, None, None] + chains.ends[:, None, :, :, None]  # [2, K, E, D, N]
    fit = (total <= room[:, None, None, None]).all(0)
    cost = np.where(fit, cost, np.inf)
    flat = cost.reshape(-1, n)
    best = flat.argmin(0)
    k, embedding, head = np.unravel_index(best, cost.shape[:3])
    path = Path(variants[k, :, rows].T, embedding.astype(np.int64), head.astype(np.int64))
    none = ~np.isfinite(flat[best, rows])
    for _ in range(_CHANGES):
        if not _improve(chains, path, room):
            break
    path.put(np.flatnonzero(none), _alone(chains, room, edge, cloud).take(np.flatnonzero(none)))
    return path


def _improve(chains: Chains, path: Path, room: Floats) -> bool:
    """Change one group of each path so that it saves most and still fits, in place; whether any path has changed."""
    groups, n = path.variant.shape
    g, rows = np.arange(groups)[:, None], np.arange(n)
    after = chains.state[g, path.variant, rows]  # [G, N]
    before = np.concatenate([path.embedding[None], after[:-1]])
    then = chains.cost.transpose(0, 2, 3, 1)[g[1:], path.variant[1:], rows]  # [G - 1, N, 3]: what comes next
    finish = chains.end[path.embedding, :, path.head, rows]  # [N, 3]
    then = np.concatenate([then, finish[None]]).transpose(0, 2, 1)  # [G, 3, N]
    cost = along(chains.cost, before[:, None, None], axis=1)[:, 0]  # [G, V, N]
    cost = cost + along(then, chains.state, axis=1)
    change = chains.held - along(chains.held, path.variant[None, :, None], axis=2)
    left = room - chains.bytes(path)
    cost = np.where((change <= left[:, None, None]).all(0), cost, np.inf)
    now = along(cost, path.variant[:, None], axis=1)
    with np.errstate(invalid="ignore"):  # a path that does not fit has no cost here
        saved = np.nan_to_num(now - cost, nan=0.0, posinf=0.0, neginf=0.0).reshape(-1, n)
    best = saved.argmax(0)
    better = np.flatnonzero(saved[best, rows] > 1e-12 * np.abs(now).min(0)[0])
    at, variant = np.divmod(best[better], chains.cost.shape[2])
    path.variant[at, better] = variant
    return bool(len(better))


def _alone(chains: Chains, room: Floats, edge: int, cloud: int) -> Path:
    """All on the cloud, else on the edge if only that fits; the mask is forgotten, the pins are not."""
    groups, n = len(chains.cost), room.shape[1]
    paths = []
    for variant, device in ((edge, 0), (cloud, 1)):
        pinned = ~np.isfinite(chains.start[device, device]), ~np.isfinite(chains.end[0, 0, device])
        ends = [np.where(p, 1 - device, device) for p in pinned]
        paths.append(Path(np.full((groups, n), variant), *ends))
    fit: Bools = np.all(np.stack([chains.bytes(p) <= room for p in paths]), axis=1)  # [2, N]
    return paths[0].where(fit[0] & ~fit[1], paths[1])
