"""A local search: from one placement to a better one, by the true clocks.

Clocks are maxima of sums, so that all that follows a sub-block is one number for each device: how long after that
device's clock the next token is there. With the clocks before a sub-block, every other way to do it is priced without
walking through the model, and so are the two of a layer together: for all layers at once. The best change is made, or
all that are better at once where that is better still. Of equally quick ways the one that costs the edge less energy is
taken.

Shapes: N sub-blocks (or layers), K holdings to choose from, D devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.planners.optimum.enumerate import Found, Step, priced
from splitray.planners.optimum.search import pour
from splitray.planners.optimum.space import MISSING_S, Kind, Space
from splitray.planners.protocol import EQUAL, equal_s_per_joule

_LEAST = 1e-12  # relative: a smaller gain is none
_PROMISING = 6  # holdings of each sub-block that are tried for both of a layer together


@dataclass(slots=True)
class _Ways:
    """Ways to do sub-blocks of one kind: by one holding, wherever they stand; [N, D] each."""

    counts: tuple[Ints, ...]
    work_s: Floats
    held: Floats
    fits: Bools  # [N]


@dataclass(slots=True)
class _Change:
    """Other ways for some sub-blocks that follow each other, and what they gain."""

    first: int
    steps: tuple[Step, ...]
    gain: float


class LocalSearch:
    """Improves one path of a space until nothing is gained.

    `holdings` are those to try, all by default.
    """

    def __init__(self, space: Space, found: Found, holdings: Sequence[int] | None = None) -> None:
        """Begin with a path that fits."""
        self.space, self.embedding, self.path = space, found.embedding, list(found.path)
        every = range(len(space.holdings)) if holdings is None else holdings
        kinds = dict.fromkeys(space.kinds)
        self._choices = {k: np.array([h for h in every if space.allowed(k)[h]], int) for k in kinds}
        self._promise: dict[Kind, list[int]] = {}
        self._tables = {k: space.crossing_s(k) for k in kinds}
        self._at = {k: np.array([i for i, each in enumerate(space.kinds) if each == k]) for k in kinds}
        devices = space.topology.devices
        edge = np.array([d.tier == "edge" for d in devices])
        self._power_w = edge * np.array([d.active_w - d.idle_w for d in devices])
        self._radio_w = edge * np.array([d.radio_w for d in devices])
        self._per_joule = equal_s_per_joule(space.topology)
        self._air, self._entry_air, self._exit_air = (
            space.radio_s(where) @ self._radio_w for where in ("crossing", "entry", "exit")
        )
        self._read()

    def run(self, rounds: int, least: float = 0.0) -> Found:
        """Change what gains most, so many times at most, or until that gains less than a share `least` of the time."""
        before = np.inf
        for _ in range(rounds):
            if before - self.seconds < least * self.seconds:
                break
            before = self.seconds
            changes = [c for k in self._at for c in self._single(k)]
            if not self._apply(changes) and not self._apply(self._pairs()) and not self._moved_embedding():
                break
        return Found(tpot_s=self.seconds, path=tuple(self.path), embedding=self.embedding)

    def _read(self) -> None:
        """Walk through the path: clocks after each sub-block, and what follows each of them."""
        space, n = self.space, len(self.path)
        known: dict[tuple[Kind, Step], tuple[Floats, Floats]] = {}
        for key in zip(space.kinds, self.path, strict=True):
            if key not in known:
                way = priced(space, key[0], key[1][0], key[1][1], self.embedding)
                known[key] = way.work_s, way.held_bytes
        each = [known[key] for key in zip(space.kinds, self.path, strict=True)]
        self._hold = np.array([h for h, _ in self.path])
        self._work = np.array([w for w, _ in each])
        self._held = np.array([m for _, m in each])
        self._left = space.memory_bytes - self._held.sum(0) - space.table_on[self.embedding] * space.table_bytes
        self._clock, self._onward = np.empty_like(self._work), np.empty_like(self._work)
        clock = space.entry_s[self.embedding, self._hold[0]] + self._work[0]
        self._clock[0] = clock
        for i in range(1, n):
            table = self._tables[space.kinds[i]][self._hold[i - 1], self._hold[i]]
            clock = (clock[:, None] + table).max(0) + self._work[i]
            self._clock[i] = clock
        onward = space.exit_s[self._hold[-1], :, self.embedding]
        self._onward[-1] = onward
        for i in range(n - 2, -1, -1):
            table = self._tables[space.kinds[i + 1]][self._hold[i], self._hold[i + 1]]
            onward = (table + (self._work[i + 1] + onward)).max(1)
            self._onward[i] = onward
        self.seconds = float((self._clock[-1] + self._onward[-1]).max())
        joule = float(self._work.sum(0) @ self._power_w)
        if self._radio_w.any():
            joule += float(self._air[self._hold[:-1], self._hold[1:]].sum())
            ends = self._entry_air[self.embedding, self._hold[0]], self._exit_air[self._hold[-1], self.embedding]
            joule += float(sum(ends))
        self._score = self.seconds + self._per_joule * joule

    def _arrivals(self, kind: Kind, at: Ints, into: Ints) -> Floats:
        """When devices may begin sub-blocks of a kind if those were done by other holdings, [N, K, D]."""
        table = self._tables[kind]
        came = np.empty((len(at), len(into), self.space.num_devices))
        inner = at > 0
        before = at[inner] - 1
        came[inner] = (self._clock[before][:, None, :, None] + table[self._hold[before][:, None], into[None]]).max(2)
        came[~inner] = self.space.entry_s[self.embedding, into]
        return came

    def _after(self, at: Ints, done_by: Ints) -> Floats:
        """How long after its end the token is there if a sub-block were done by other holdings, [N, K, D]."""
        space, last = self.space, len(self.path) - 1
        found = np.empty((len(at), len(done_by), space.num_devices))
        inner = at < last
        if inner.any():
            following = at[inner] + 1
            table = self._tables[space.kinds[int(following[0])]]
            then = self._work[following] + self._onward[following]
            found[inner] = (table[done_by[None], self._hold[following][:, None]] + then[:, None, None]).max(3)
        if not inner.all():
            found[~inner] = space.exit_s[done_by, :, self.embedding]
        return found

    def _ways(self, kind: Kind, holding: int, came: Floats, after: Floats, left: Floats) -> _Ways:
        """How one holding does sub-blocks that it may begin at `came`, so that they are soonest through."""
        self.space.deadline.check()
        space, shared = self.space, self.space.holdings[holding]
        devices = list(shared.devices)
        free = space.free_rows(kind, self.embedding)
        work, held = np.zeros(came.shape), np.zeros(came.shape)
        work[:, devices] = space.launch_s[devices]
        counts, fits = [], np.ones(len(came), bool)
        for part in space.pieces(kind):
            each = np.where(free, 0.0, part.piece_bytes)
            share = np.zeros(came.shape, np.int64)
            if not shared.partitioned:
                share[:, devices] = part.count
            else:
                with np.errstate(divide="ignore", invalid="ignore"):
                    room = np.floor((left - held)[:, devices] / each[devices])
                room = np.where(each[devices] > 0, np.clip(room, 0, part.count), part.count)
                offset = (came + work + after)[:, devices]
                share[:, devices] = pour(np.where(np.isfinite(offset), offset, 0.0), part, devices, room)
                fits &= (share.sum(1) == part.count) & (share[:, devices] > 0).all(1)
            work, held = work + share * part.piece_s, held + share * each
            counts.append(share)
        return _Ways(tuple(counts), work, held, fits & (held <= left).all(1))

    def _single(self, kind: Kind) -> list[_Change]:
        """For each sub-block of a kind the best other way that gains something."""
        at, into = self._at[kind], self._choices[kind]
        came, after, left = self._arrivals(kind, at, into), self._after(at, into), self._left + self._held[at]
        score = np.full((len(at), len(into)), np.inf)
        ways = []
        for k, holding in enumerate(map(int, into)):
            way = self._ways(kind, holding, came[:, k], after[:, k], left)
            ways.append(way)
            total = (came[:, k] + way.work_s + after[:, k]).max(1)
            score[:, k] = np.where(way.fits, total + self._spent(at, at, way.work_s, [holding]), np.inf)
        self._promise[kind] = [int(into[k]) for k in np.argsort(score.min(0), kind="stable")[:_PROMISING]]
        best = score.argmin(1)
        return [
            _Change(int(i), ((int(into[k]), tuple(tuple(map(int, c[row])) for c in ways[k].counts)),), self._score - s)
            for row, (i, k) in enumerate(zip(at, best, strict=True))
            if (s := float(score[row, k])) < self._score * (1 - _LEAST)
        ]

    def _pairs(self) -> list[_Change]:
        """For each layer the best other way to do its two sub-blocks together that gains something."""
        first, second = self.space.kinds[:2] if len(self.space.kinds) > 2 else ("head", "head")
        if first == second or not self._per_layer:
            return []
        at = self._at[first]
        into, onto = (
            np.array([*dict.fromkeys([*self._promise[k], *map(int, self._hold[self._at[k]])])][: _PROMISING + 2])
            for k in (first, second)
        )
        came, after = self._arrivals(first, at, into), self._after(at + 1, onto)
        left = self._left + self._held[at] + self._held[at + 1]
        table, best = self._tables[second], np.full(len(at), self._score * (1 - _LEAST))
        steps: list[tuple[Step, ...]] = [()] * len(at)
        for a, holding in enumerate(map(int, into)):
            members = set(self.space.holdings[holding].devices)
            for f, other in enumerate(map(int, onto)):
                devices = set(self.space.holdings[other].devices)
                if not (members <= devices or devices <= members) or table[holding, other].max() > MISSING_S / 2:
                    continue
                onward = (table[holding, other][None] + after[:, f, None]).max(2)
                one = self._ways(first, holding, came[:, a], onward, left)
                begin = ((came[:, a] + one.work_s)[:, :, None] + table[holding, other]).max(1)
                two = self._ways(second, other, begin, after[:, f], left - one.held)
                total = (begin + two.work_s + after[:, f]).max(1)
                score = total + self._spent(at, at + 1, one.work_s + two.work_s, [holding, other])
                for row in np.flatnonzero(one.fits & two.fits & (score < best)):
                    best[row] = score[row]
                    steps[row] = tuple(
                        (h, tuple(tuple(map(int, c[row])) for c in way.counts))
                        for h, way in ((holding, one), (other, two))
                    )
        return [_Change(int(i), s, self._score - float(b)) for i, s, b in zip(at, steps, best, strict=True) if s]

    def _moved_embedding(self) -> bool:
        """Hold the embedding where that is quicker, if it is anywhere."""
        space, last = self.space, self.space.pieces("head")[0]
        way = np.where(np.eye(space.num_devices, dtype=bool), 0.0, -np.inf) + self._work[0]  # from arrival to the end
        for i in range(1, len(self.path)):
            table = self._tables[space.kinds[i]][self._hold[i - 1], self._hold[i]]
            way = (way[:, :, None] + table).max(1) + self._work[i]
        through = (space.entry_s[:, self._hold[0], :, None] + way).max(1)  # [E, D]
        total = (through + space.exit_s[self._hold[-1]].T).max(1)
        counts = np.array(self.path[-1][1][0])
        layers = self._held[:-1].sum(0)
        best, before = self.seconds * (1 - EQUAL), self.embedding
        for e in space.embeddings:
            head = np.where(space.free_rows("head", e), 0.0, counts * last.piece_bytes)
            fits = (layers + head + space.table_on[e] * space.table_bytes <= space.memory_bytes).all()
            if fits and total[e] < best:
                best, self.embedding = float(total[e]), e
        self._read()
        return self.embedding != before

    @property
    def _per_layer(self) -> bool:
        return len(self.space.kinds) == 2 * self.space.arch.num_layers + 1

    def _spent(self, first: Ints, last: Ints, work_s: Floats, holdings: Sequence[int]) -> Floats:
        """What the edge's energy would cost if these sub-blocks were done otherwise; time decides first, [N]."""
        if not self._per_joule:
            return np.zeros(len(first))
        before = self._work[first] if first is last else self._work[first] + self._work[last]
        joule = (work_s - before) @ self._power_w
        if self._radio_w.any():
            now = [self._hold[first]] if first is last else [self._hold[first], self._hold[last]]
            then = [np.full(len(first), h) for h in holdings]
            joule = joule + self._radio_j(first, last, then) - self._radio_j(first, last, now)
        return self._score - self.seconds + self._per_joule * joule

    def _radio_j(self, first: Ints, last: Ints, path: Sequence[Ints]) -> Floats:
        """What the edge's radios spend around and within some sub-blocks that holdings [N] do one after the other."""
        before, after = self._hold[first - 1], self._hold[np.minimum(last + 1, len(self.path) - 1)]
        begin_j = np.where(first > 0, self._air[before, path[0]], self._entry_air[self.embedding, path[0]])
        within_j = sum((self._air[a, b] for a, b in pairwise(path)), np.zeros(len(first)))
        ends = last + 1 == len(self.path)
        end_j = np.where(ends, self._exit_air[path[-1], self.embedding], self._air[path[-1], after])
        return begin_j + within_j + end_j

    def _apply(self, changes: list[_Change]) -> bool:
        """Make all changes, or a half of them, or the best one alone, whatever is best; False if there is none."""
        if not changes:
            return False
        changes = sorted(changes, key=lambda c: -c.gain)
        path, score, held, room = self.path, self._score, self._held, self._left
        tried: list[tuple[float, list[Step]]] = []
        for many in dict.fromkeys((len(changes), (len(changes) + 1) // 2, 1)):
            self.path, left = list(path), room
            for change in changes[:many]:
                rows = slice(change.first, change.first + len(change.steps))
                kinds = self.space.kinds[rows]
                taken = sum(priced(self.space, k, *step, self.embedding).held_bytes
                            for k, step in zip(kinds, change.steps, strict=True))  # fmt: skip
                spare = left + held[rows].sum(0) - taken
                if (spare >= 0).all():
                    left, self.path[rows] = spare, list(change.steps)
            self._read()
            if self._score < score * (1 - _LEAST):
                tried.append((self._score, self.path))
                if many == len(changes):
                    break
        self.path = min(tried, key=lambda each: each[0])[1] if tried else path
        self._read()
        return bool(tried)
