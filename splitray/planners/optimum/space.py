"""What a decode step costs, sub-block by sub-block, as tables: the ground that exact and drift_plus_penalty stand on.

A sub-block is done by a `BlockHolding`: one device, several that share it by count, or several that each do all. Its
work is affine in the counts, and a boundary maps the times at which its senders have finished to the times at which
its receivers may begin by maxima of sums: arrival_j = max_i(finish_i + crossing[i, j]). Both come from cost.py, so a
path through the tables takes exactly the time that `CostModel.tpot_s` gives its placement. One thing is left out, as it
is not affine: devices that share one memory slow each other down; their paths take longer than the tables say.

Shapes: S holdings, E holdings of the embedding (one device, or several with a copy each), D devices. Times in seconds;
-inf where nothing is sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitray.arrays import Bools, Floats, Ints
from splitray.cost import Rates, exchange
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.memory import (
    each_held,
    embedding_bytes,
    ffn_unit_bytes,
    group_bytes,
    model_bytes,
    shares_table,
    vocab_row_bytes,
)
from splitray.planners.optimum.deadline import NEVER, Deadline
from splitray.planners.optimum.patterns import BlockHolding, Messages, patterns
from splitray.planners.protocol import ClusterState, Freedom
from splitray.quality.weight_loss import charged, shipped_weight_loss
from splitray.topology import DeviceId

Counts = tuple[int, ...]
Kind = Literal["attention", "ffn", "layer", "head"]
Part = Literal["attention", "ffn", "head"]
MISSING_S = 1e15  # what a boundary takes that needs a link which is not there
MOST_SHARED = 5  # more devices than these are used for whole sub-blocks only
MOST_DEVICES = 16  # of more the rest is left out, see `Space.part`
_FEW_DEVICES = 8  # of so many, unless they are too small together
_AT_ONCE = 1024  # boundaries that are priced together


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The equal pieces of one part of a sub-block: how many, seconds of one on each device, and its bytes."""

    part: Part
    count: int
    total: int
    piece_s: Floats  # [D]
    piece_bytes: Floats  # [D]

    def ranges(self, counts: Sequence[int], ids: Sequence[str]) -> Shares:
        """Contiguous ranges in device order."""
        edges = np.concatenate([[0], np.cumsum(counts)]) * self.total // self.count
        return Shares.of({str(d): [(int(edges[i]), int(edges[i + 1]))] for i, d in enumerate(ids)})


class Space:
    """The placements that a planner may choose from, for one state.

    `freedom`: `one_device`; `layers` whole sub-blocks on any device in any order; `heads` by count with the FFN whole
    (the space of arXiv 2505.02533); `all` is what the engine can execute: heads by count, FFN by columns and the head
    by rows, attention, FFN and embedding replicated or not. `blocks` coarsens columns and rows to so many equal blocks,
    for searches that enumerate them. `positions`: new tokens of a step, 1 while decoding; a prompt of several has
    nothing before it, and its last one enters the head. Searches of the space end by the `deadline` (deadline.py).
    """

    def __init__(
        self,
        state: ClusterState,
        freedom: Freedom = "all",
        *,
        blocks: int | None = None,
        most_shared: int = MOST_SHARED,
        positions: float = 1.0,
        deadline: Deadline = NEVER,
    ) -> None:
        """Price pieces and boundaries; the tables are made when they are first asked for."""
        self.state, self.freedom, self.arch, self.topology = state, freedom, state.arch, state.topology
        self.coarse = blocks is not None
        self.shares_table = shares_table(state)
        self.rates = Rates.of(state.topology, state.arch)
        self.num_devices = len(state.topology.devices)
        self.rhythms: dict[tuple[int, int], tuple[Floats, Floats] | None] = {}
        self.launch_s = self.rates.launch_s[0]
        self.memory_bytes = np.array([d.memory_bytes for d in state.topology.devices])
        self.positions, self.deadline = positions, deadline
        arch, context = self.arch, max(1, state.context_tokens) if positions == 1 else positions
        self._attention = self._pieces(
            "attention",
            arch.num_kv_heads,
            arch.num_kv_heads,
            positions * (2 * arch.group_params + 4 * arch.heads_per_group * arch.head_dim * context),
            group_bytes(replace(state, context_tokens=0)) + arch.kv_bytes_per_token * context,
            group_bytes(state),
        )
        self._ffn = self._weights(
            "ffn",
            min(arch.ffn_dim, blocks or arch.ffn_dim),
            arch.ffn_dim,
            arch.ffn_unit_params,
            ffn_unit_bytes(state),
            positions,
        )
        self.table_bytes = embedding_bytes(state).astype(float)
        """Of the embedding on each device, [D]."""
        whole_head = freedom != "all" or state.pinned_head is not None
        rows = 1 if whole_head else min(arch.vocab, blocks or arch.vocab)
        self._head = self._weights("head", rows, arch.vocab, arch.vocab_row_params, vocab_row_bytes(state))
        self.holdings = self._holdings(most_shared)
        layer: tuple[Kind, ...] = ("layer",) if arch.parallel_block else ("attention", "ffn")
        self.kinds: tuple[Kind, ...] = layer * arch.num_layers + ("head",)
        ids = state.topology.ids
        pinned = state.pinned_embedding
        free = [i for i, d in enumerate(ids) if pinned is None or d == pinned]
        # Prompts start at the origin; where it reaches no device that may hold the table, any is as good as another.
        served = [i for i in free if state.topology.serves(ids[i])] or free
        copied = [i for i in served if i in self.shared] if freedom == "all" else []
        held = each_held(state)
        sets = [
            BlockHolding(c, True)
            for n in range(2, len(copied) + 1)
            for c in combinations(copied, n)
            if len({held[d].format.table for d in c}) == 1
        ]
        self.tables = (*(BlockHolding((d,)) for d in range(self.num_devices)), *sets)
        """Who may hold the embedding: each device alone, then several."""
        self.embeddings = [*served, *range(self.num_devices, len(self.tables))]
        self.table_on = np.array([[d in e.devices for d in range(self.num_devices)] for e in self.tables])  # [E, D]

    @staticmethod
    def part(state: ClusterState) -> ClusterState:
        """The state itself, or one with a few devices of most use, where tables of all of them would be too large.

        The origin, then those that it reaches and the fastest of them; the largest, where those have too little memory,
        and then more of them.
        """
        where = state.topology
        if len(where.ids) <= MOST_DEVICES:
            return state
        others = [d for d in where.devices if d.id != where.origin]
        fastest = sorted(others, key=lambda d: (not where.serves(d.id), -d.memory_bandwidth_bytes_per_s))
        largest = sorted(others, key=lambda d: (not where.serves(d.id), -d.memory_bytes))
        for many, few in product((_FEW_DEVICES, MOST_DEVICES), (fastest, largest)):
            part = where.among({where.origin, *(d.id for d in few[: many - 1])})
            if sum(d.memory_bytes for d in part.devices) > model_bytes(state):
                break
        return replace(state, topology=part)

    def _pieces(
        self, part: Part, count: int, total: int, flops: float, read_bytes: NDArray[Any], held_bytes: NDArray[Any]
    ) -> Pieces:
        seconds = np.maximum(flops / self.rates.flops_per_s[0], read_bytes / self.rates.bytes_per_s[0])
        return Pieces(part=part, count=count, total=total, piece_s=seconds, piece_bytes=held_bytes.astype(float))

    def _weights(
        self, part: Part, count: int, total: int, params: int, unit_bytes: Ints, positions: float = 1.0
    ) -> Pieces:
        each = total / count
        flops, num_bytes = 2 * params * each * positions, unit_bytes * each
        return self._pieces(part, count, total, flops, num_bytes, num_bytes)

    def _holdings(self, most_shared: int) -> tuple[BlockHolding, ...]:
        single = [BlockHolding((d,)) for d in range(self.num_devices)]
        fast = np.argsort(-self.rates.bytes_per_s[0], kind="stable")[:most_shared]
        self.shared = few = sorted(map(int, fast))
        if self.freedom in ("one_device", "layers"):
            return tuple(single)
        sets = [c for n in range(2, len(few) + 1) for c in combinations(few, n)]
        ids = self.topology.ids
        able = {d for d in few if any(self.linked(ids[d], other) for other in ids)}
        linked = [c for c in sets if able.issuperset(c)]  # two that share need no link if another one is between them
        shared = [BlockHolding(c) for c in linked]
        copies = [BlockHolding(c, True) for c in linked if len({self.arch.on(ids[d]).format for d in c}) == 1]
        return tuple(single + shared + (copies if self.freedom == "all" else []))

    def linked(self, a: DeviceId, b: DeviceId) -> bool:
        """Whether both can send to each other."""
        return self.topology.link(a, b) is not None and self.topology.link(b, a) is not None

    def pieces(self, kind: Kind) -> tuple[Pieces, ...]:
        """What a sub-block of this kind consists of."""
        match kind:
            case "attention":
                return (self._attention,)
            case "ffn":
                return (self._ffn,)
            case "layer":
                return self._attention, self._ffn
            case "head":
                return (self._head,)

    def allowed(self, kind: Kind) -> Bools:
        """Which holdings may do a sub-block of this kind, [S]."""
        most = min(p.count for p in self.pieces(kind))
        pinned = self.state.pinned_head
        return np.array(
            [
                not (kind == "head" and h.replicated)
                and not (kind == "ffn" and self.freedom == "heads" and len(h.devices) > 1)
                and not (h.partitioned and len(h.devices) > most)
                and not (kind == "head" and pinned is not None and self.topology.ids[h.devices[0]] != pinned)
                for h in self.holdings
            ]
        )

    def weights_loss(self, part: Part) -> Floats:
        """What a whole sub-block costs in quality for the format in which each device holds weights, [D]."""
        table, layers = shipped_weight_loss(), self.arch.num_layers
        return np.array([table.piece_loss(charged(a), part, layers) for a in each_held(self.state)])

    def free_rows(self, kind: Kind, embedding: int) -> Bools:
        """Where pieces of this kind take no memory: rows of a tied table beside the embedding, [D]."""
        return self.table_on[embedding] & self.shares_table & (kind == "head")

    @cached_property
    def _tables(self) -> dict[str, Floats]:
        """Every boundary of the space at once, each a max-plus matrix [D, D]."""
        lists = patterns(self.arch, self.topology, self.holdings, self.tables, self.state.codec)
        many = {"crossing": self.positions, "entry": self.positions, "inner": self.positions}
        every = [each for name in lists for each in lists[name]]
        times = np.concatenate([np.full(len(v), many.get(name, 1.0)) for name, v in lists.items()])
        matrices, on_air = map(np.concatenate, zip(*self._exchanged(every, times), strict=True))
        n, s, e = self.num_devices, len(self.holdings), len(self.tables)
        sizes = np.cumsum([len(v) for v in lists.values()])[:-1]
        found = dict(zip(lists, np.split(matrices, sizes), strict=True))
        air = dict(zip(lists, np.split(on_air, sizes), strict=True))
        gathered, sent = found["best"], found["token"].reshape(s, e, n, n)  # [S, source, sampler], [S, E, ..]
        leads = np.array([h.devices[0] for h in self.holdings])
        to_lead = gathered[np.arange(s), :, leads]
        held = np.where(self.table_on, 0.0, -np.inf)  # [E, D]
        from_lead = (sent[np.arange(s), :, leads] + held).max(2)  # [S, E]: until the last holder has the token
        return {
            "crossing": np.where(
                self._idle(lists["crossing"])[..., None, None], MISSING_S, found["crossing"].reshape(s, s, n, n)
            ),
            "entry": (found["entry"].reshape(e, s, n, n) + held[:, None, :, None]).max(2),
            "inner": found["inner"],
            # the embedding's devices must also have done what they do themselves
            "exit": np.maximum(to_lead[:, :, None] + from_lead[:, None, :], held.T),
            "crossing_air": air["crossing"].reshape(s, s, n),
            "entry_air": air["entry"].reshape(e, s, n),
            "exit_air": air["best"][:, None] + air["token"].reshape(s, e, n),
        }

    def _idle(self, crossing: Sequence[Messages]) -> Bools:
        """Where copies are followed by a sub-block for which one of them does nothing, [S, S]: fewer copies do as well.

        It neither does that sub-block nor tells another device what it needs.
        """
        tell = [{m[0] for m in messages} for messages in crossing]
        pairs = [(a, b) for a in self.holdings for b in self.holdings]
        idle = [a.replicated and not set(a.devices) <= {*b.devices, *t} for (a, b), t in zip(pairs, tell, strict=True)]
        return np.array(idle).reshape(len(self.holdings), -1)

    @cached_property
    def crosses(self) -> Bools:
        """Whether anything is sent from one holding to the next, [S, S]."""
        between = patterns(self.arch, self.topology, self.holdings, self.tables, self.state.codec)["crossing"]
        return np.array([bool(messages) for messages in between]).reshape(len(self.holdings), -1)

    def radio_s(self, where: Literal["crossing", "entry", "exit"]) -> Floats:
        """Seconds that each device sends or receives at a boundary: [S, S, D], [E, S, D] or [S, E, D]."""
        return self._tables[f"{where}_air"]

    def crossing_s(self, into: Kind) -> Floats:
        """From any holding of a sub-block to any of the next, which is of that kind, [S, S, D, D]."""
        table = self._tables["crossing"]
        if not (self.arch.qk_norm_over_heads and into == "attention"):
            return table
        return np.max(table[..., None] + self._tables["inner"][None, :, None], axis=-2)

    @cached_property
    def entry_s(self) -> Floats:
        """From the embedding at time 0 to any holding of the first sub-block, [E, S, D]."""
        table = self._tables["entry"]
        if self.arch.qk_norm_over_heads:
            table = np.max(table[..., None] + self._tables["inner"][None], axis=-2)
        return np.maximum(table, 0.0)  # a device that waits for nothing begins at 0

    @property
    def exit_s(self) -> Floats:
        """From any holding of the head to the next token at the embedding, [S, D, E]: max_i(f_i + it)."""
        return self._tables["exit"]

    def _exchanged(self, messages: Sequence[Messages], times: Floats) -> Iterator[tuple[Floats, Floats]]:
        """For each list what arrives if one device finishes at 0, [.., D, D], and time on air, [.., D], in portions.

        `times` multiplies the bytes of each list, [len].
        """
        for start in range(0, len(messages), _AT_ONCE):
            self.deadline.check()
            portion = slice(start, start + _AT_ONCE)
            yield self._exchanged_at_once(messages[portion], times[portion])

    def _exchanged_at_once(self, messages: Sequence[Messages], times: Floats) -> tuple[Floats, Floats]:
        n, d = len(messages), self.num_devices
        sends, payload = np.zeros((n, d, d), bool), np.zeros((n, d, d))
        flat = [(k, *m) for k, each in enumerate(messages) for m in each]
        if flat:
            k, source, target, num_bytes = np.array(flat).T
            sends[k, source, target], payload[k, source, target] = True, num_bytes
        payload *= times[:, None, None]
        rate = self.rates.link_bytes_per_s
        on_air = np.where(sends, payload / np.where(rate > 0, rate, 1.0), 0.0)
        transfer = on_air + sends * self.rates.exchange_s
        unit = np.where(np.eye(d, dtype=bool), 0.0, -np.inf)
        rows = np.repeat(np.arange(n), d)
        # Who sends nothing must not take a shared medium's turn: its own finish is put back afterwards.
        senders: Bools = np.any(sends, axis=2)
        finish = np.where(senders[:, None], unit, -np.inf).reshape(n * d, d)
        arrival = np.maximum(exchange(finish, sends[rows], transfer[rows], self.rates).reshape(n, d, d), unit)
        missing = (sends & (rate <= 0)).any((1, 2))
        if missing.any():
            arrival[missing] = np.where(np.isfinite(arrival[missing]), MISSING_S, -np.inf)
        return arrival, on_air.sum(2) + on_air.sum(1)

    def seconds(self, path: Sequence[tuple[int, Sequence[Counts]]], embedding: int) -> float:
        """The time of a path by its true clocks, as `CostModel.tpot_s` of its placement."""
        clock: Floats = np.zeros(self.num_devices)
        before = -1
        for i, (kind, (holding, counts)) in enumerate(zip(self.kinds, path, strict=True)):
            if i:
                clock = np.max(clock[:, None] + self.crossing_s(kind)[before, holding], axis=0)
            else:
                clock = self.entry_s[embedding, holding].copy()
            devices = list(self.holdings[holding].devices)
            clock[devices] += self.launch_s[devices]
            for part, count in zip(self.pieces(kind), counts, strict=True):
                clock = clock + np.array(count) * part.piece_s
            before = holding
        return float(np.max(clock + self.exit_s[before, :, embedding]))

    def placement(self, path: Sequence[tuple[int, tuple[Counts, ...]]], embedding: int) -> Placement:
        """The placement of a path: for each sub-block its holding and, for each part, pieces by device."""
        ids = self.topology.ids
        known: dict[tuple[str, int, tuple[Counts, ...]], list[Shares]] = {}
        shares = []
        for kind, (h, counts) in zip(self.kinds, path, strict=True):
            key = kind, h, counts
            if key not in known:
                holders = [ids[d] for d in self.holdings[h].devices]
                known[key] = [
                    p.ranges(c, ids) if self.holdings[h].partitioned else Shares.whole(p.total, *holders)
                    for p, c in zip(self.pieces(kind), counts, strict=True)
                ]
            shares.append(known[key])
        flat = [x for each in shares[:-1] for x in each]
        layers = tuple(LayerPlacement(a, f) for a, f in zip(flat[::2], flat[1::2], strict=True))
        return Placement(layers, tuple(ids[d] for d in self.tables[embedding].devices), shares[-1][0])

    def path_of(self, placement: Placement) -> tuple[tuple[tuple[int, tuple[Counts, ...]], ...], int] | None:
        """The path of a placement and the holding of its embedding; None where this space has no such path."""
        if not self.topology.index.keys() >= set(placement.devices):
            return None
        index, ids = {h: i for i, h in enumerate(self.holdings)}, self.topology.ids
        known: dict[tuple[Shares, ...], tuple[int, tuple[Counts, ...]] | None] = {}

        def step(kind: Kind, *shares: Shares) -> tuple[int, tuple[Counts, ...]] | None:
            if shares in known:
                return known[shares]
            devices = tuple(i for i, d in enumerate(ids) if any(d in s.devices for s in shares))
            parts = self.pieces(kind)
            copied = len(devices) > 1 and all(s.is_replicated(p.total) for s, p in zip(shares, parts, strict=True))
            at = index.get(BlockHolding(devices, copied))
            counts = []
            for share, part in zip(shares, parts, strict=True):
                pieces = [share.count(d) * part.count / part.total for d in ids]
                counts.append(tuple(round(n) for n in pieces))
                if any(abs(n - round(n)) > 1e-9 for n in pieces):
                    at = None
            known[shares] = None if at is None or not self.allowed(kind)[at] else (at, tuple(counts))
            return known[shares]

        if self.arch.parallel_block:
            steps = [step("layer", x.attention, x.ffn) for x in placement.layers]
        else:
            steps = [s for x in placement.layers for s in (step("attention", x.attention), step("ffn", x.ffn))]
        steps.append(step("head", placement.head))
        table = BlockHolding(
            tuple(i for i, d in enumerate(ids) if d in placement.embedding), len(placement.embedding) > 1
        )
        path = [s for s in steps if s is not None]
        embedding = next((e for e in self.embeddings if self.tables[e] == table), None)
        return None if len(path) < len(steps) or embedding is None else (tuple(path), embedding)
