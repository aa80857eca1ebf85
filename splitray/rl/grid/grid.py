"""Every two-device placement that a learned policy may choose: its load, memory and moves for N instances at once.

A placement of the grid is whole layers, heads by count and FFN columns by sixteenths, alike over a group of layers.
What `Grid` says of N choices is what compile_route, load_of, needed_bytes and migration.diff say of each, read off
tables: a sub-block has few ways to be held, and two neighbours decide what crosses. The edge is the topology's first
device and the cloud its second, whatever their tiers.

Shapes: N instances, G groups, B stages of `Load`, K ways to hold a sub-block; devices and directions (edge to cloud,
cloud to edge) are axes of length 2.
"""

from collections.abc import Sequence

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Bools, Floats, Ints
from splitray.codecs import Codec, encoded_bytes
from splitray.cost import Load, Rates
from splitray.errors import ModelError, TopologyError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.protocol import RequestShape
from splitray.rl.grid.choice import CLOUD, COPIED, EDGE, SIXTEENTHS, SPLIT, Choice
from splitray.rl.grid.pace import SENDS
from splitray.rl.grid.plan import Program
from splitray.route import TOKEN_BYTES
from splitray.topology import Topology

__all__ = ["CLOUD", "COPIED", "EDGE", "SIXTEENTHS", "SPLIT", "Choice", "Grid"]


class Grid:
    """The placements of one model on one pair of devices.

    `layers` are the runs of layers that are placed alike; `num_heads` counts KV-head groups; `units` are the FFN
    columns (or experts) that so many sixteenths mean, [17].
    """

    def __init__(self, arch: ModelArch, topology: Topology, *, groups: int = 12, codec: Codec = "none") -> None:
        """Make the tables.

        Raises:
            TopologyError: not two devices, or no link between them each way.
            ModelError: a layer of this model is not attention followed by an FFN with plain crossings.
        """
        _check(arch, topology)
        self.arch, self.topology, self.codec = arch, topology, codec
        count = max(1, min(groups, arch.num_layers))
        edges = [i * arch.num_layers // count for i in range(count + 1)]
        self.layers = tuple(range(a, b) for a, b in zip(edges, edges[1:], strict=False))
        self.num_groups = count
        self.num_heads = arch.num_kv_heads
        self.sizes: Ints = np.array([len(r) for r in self.layers])
        self.units: Ints = np.arange(SIXTEENTHS + 1) * arch.ffn_dim // SIXTEENTHS
        self._group_of = np.repeat(np.arange(count), self.sizes)
        self._origin = topology.ids.index(topology.origin)
        self._fill_tables()

    def _fill_tables(self) -> None:
        """Codes: the embedding and the head on either device, `heads` + 1 splits and a copy, 17 splits, nothing."""
        arch, h = self.arch, self.num_heads
        self._attention, self._ffn = 4, 4 + h + 2
        self._nothing = self._ffn + SIXTEENTHS + 1
        groups, units, rows = (np.zeros((self._nothing + 1, 2), np.int64) for _ in range(3))
        rows[2, EDGE] = rows[3, CLOUD] = arch.vocab
        on_edge = np.arange(h + 1)
        groups[self._attention : self._ffn - 1] = np.stack([on_edge, h - on_edge], axis=1)
        groups[self._ffn - 1] = h
        units[self._ffn : self._nothing] = np.stack([self.units, arch.ffn_dim - self.units], axis=1)
        params = groups * arch.group_params + units * arch.ffn_unit_params
        read = [[arch.weight_bytes(int(p)) for p in row] for row in params]
        tables = [[arch.table_bytes(int(p)) for p in row] for row in rows * arch.vocab_row_params]
        self._weight_bytes = np.array(read, float) + tables
        self._flops = (2 * params).astype(float)
        self._kv_bytes = (groups * arch.kv_bytes_per_token).astype(float)
        self._attention_flops = (4 * groups * arch.heads_per_group * arch.head_dim).astype(float)
        self._launches = ((groups + units + rows) > 0).astype(float)
        self._groups, self._params = groups, params
        held = (groups + units + rows) > 0
        state = np.where(held.all(1), 2, np.where(held[:, EDGE], EDGE, CLOUD))
        state[:2] = EDGE, CLOUD
        state[self._ffn - 1] = 3
        self._state = state
        # What crosses: 16 pairs of states, the same into the head, nothing, and the token from head to embedding.
        num_bytes = encoded_bytes(self.codec, 1, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
        self._sends = np.zeros((37, 2, 2), bool)
        self._position_bytes, self._sequence_bytes = np.zeros((37, 2, 2)), np.zeros((37, 2, 2))
        ways = SENDS.reshape(16, 2)
        for d in (EDGE, CLOUD):
            self._sends[:16, d, 1 - d] = self._sends[16:32, d, 1 - d] = ways[:, d]
            self._position_bytes[:16, d, 1 - d] = self._sequence_bytes[16:32, d, 1 - d] = ways[:, d] * num_bytes
            for embedding in (EDGE, CLOUD):
                at = 33 + 2 * d + embedding, d, 1 - d
                self._sends[at] = 1 - d in (embedding, self._origin)
                self._sequence_bytes[at] = self._sends[at] * TOKEN_BYTES

    def _codes(self, choice: Choice) -> tuple[Ints, Ints]:
        """How attention and FFN of each group are held, [N, G] each."""
        mode, heads, ffn = choice.mode, np.asarray(choice.heads), np.asarray(choice.ffn)
        assert mode.shape[1] == self.num_groups, f"{mode.shape[1]} groups of {self.num_groups}"
        assert heads.min() >= 0 <= ffn.min() and heads.max() <= self.num_heads and ffn.max() <= SIXTEENTHS, "shares"
        here, there, copied = mode == EDGE, mode == CLOUD, mode == COPIED
        attention = np.where(copied, self.num_heads + 1, np.where(here, self.num_heads, np.where(there, 0, heads)))
        columns = np.where(here, SIXTEENTHS, np.where(there, 0, ffn))
        return self._attention + attention, self._ffn + columns

    def load(self, choice: Choice) -> Load:
        """What the placements make each device do and send: `load_of` of each, side by side."""
        n, stages = choice.num_instances, 2 * self.arch.num_layers + 3
        code = np.empty((n, stages), np.int64)
        code[:, 0], code[:, -2], code[:, -1] = choice.embedding, 2 + choice.head, self._nothing
        attention, ffn = self._codes(choice)
        code[:, 1:-2:2], code[:, 2:-2:2] = attention[:, self._group_of], ffn[:, self._group_of]
        state = self._state[code[:, :-1]]
        pair = np.empty((n, stages), np.int64)
        pair[:, :-2] = 4 * state[:, :-1] + state[:, 1:]
        pair[:, -3] += 16
        pair[:, -2], pair[:, -1] = 32, 33 + 2 * choice.head + choice.embedding
        devices = np.arange(2)
        return Load(
            devices=self.topology.ids, origin=self._origin,
            weight_bytes=self._weight_bytes.take(code, 0), flops=self._flops.take(code, 0),
            kv_bytes=self._kv_bytes.take(code, 0), attention_flops=self._attention_flops.take(code, 0),
            launches=self._launches.take(code, 0),
            head_flops=(choice.head[:, None] == devices) * (2.0 * self.arch.vocab * self.arch.vocab_row_params),
            sends=self._sends.take(pair, 0), position_bytes=self._position_bytes.take(pair, 0),
            sequence_bytes=self._sequence_bytes.take(pair, 0), embeds=choice.embedding[:, None] == devices,
        )  # fmt: skip

    def placement(self, choice: Choice, i: int) -> Placement:
        """The placement of one instance: the edge's heads and columns come first."""
        edge, cloud = self.topology.ids
        attention, ffn = self._codes(choice.take([i]))
        layers: list[LayerPlacement] = []
        known: dict[tuple[int, int], LayerPlacement] = {}
        for size, a, f in zip(self.sizes, attention[0] - self._attention, ffn[0] - self._ffn, strict=True):
            heads, units = int(a), int(self.units[f])
            if (heads, units) not in known:
                held = Shares.whole(self.num_heads, edge, cloud)
                if heads <= self.num_heads:
                    held = Shares.of({edge: [(0, heads)], cloud: [(heads, self.num_heads)]})
                columns = Shares.of({edge: [(0, units)], cloud: [(units, self.arch.ffn_dim)]})
                known[heads, units] = LayerPlacement(held, columns)
            layers += [known[heads, units]] * int(size)
        ends = self.topology.ids[int(choice.embedding[i])], self.topology.ids[int(choice.head[i])]
        return Placement(tuple(layers), (ends[0],), Shares.whole(self.arch.vocab, ends[1]))

    def choice_of(self, placement: Placement) -> Choice:
        """The choice (N = 1) that this placement is, or the nearest one: means over a group, rounded."""
        edge, cloud = self.topology.ids
        h, total = self.num_heads, self.arch.ffn_dim
        mode, heads, ffn = np.zeros((1, self.num_groups), np.int8), *np.zeros((2, 1, self.num_groups), np.int64)
        for g, rows in enumerate(self.layers):
            layers = placement.layers[rows.start : rows.stop]
            copies = [x.attention.is_replicated(h) for x in layers]
            # copies count half, so that what is not copied as a whole is shared evenly
            on_edge = [_edge_share(x.attention, edge, cloud) for x in layers]
            columns = float(np.mean([_edge_share(x.ffn, edge, cloud) for x in layers])) * total
            copied = 2 * sum(copies) > len(copies)
            k = h if copied else int(np.rint(np.mean(on_edge) * h))
            f = int(np.abs(self.units - columns).argmin())
            mode[0, g] = COPIED if copied else SPLIT
            if not copied and (k, self.units[f]) in ((h, total), (0, 0)):
                mode[0, g], f = (EDGE, SIXTEENTHS) if k else (CLOUD, 0)
            heads[0, g], ffn[0, g] = k, f
        embedding = int(self.topology.ids.index(placement.embedding[0]))
        head = int(placement.head.count(cloud) > placement.head.count(edge))
        return Choice(mode, heads, ffn, np.array([embedding]), np.array([head]))

    def memory_bytes(self, choice: Choice, context_tokens: float | Floats) -> Floats:
        """Weights and KV of `context_tokens` ([N] or a number) on each device, [N, 2], as `needed_bytes` says."""
        attention, ffn = self._codes(choice)
        params = ((self._params[attention] + self._params[ffn]) * self.sizes[:, None]).sum(1)
        arch, devices = self.arch, np.arange(2)
        at_embedding, at_head = choice.embedding[:, None] == devices, choice.head[:, None] == devices
        weights: Floats = np.rint(params * arch.bits / 8) + arch.embedding_bytes * at_embedding
        head = arch.table_bytes(arch.vocab * arch.vocab_row_params)
        weights = weights + head * (at_head & ~(at_embedding & arch.shares_table))
        groups = (self._groups[attention] * self.sizes[:, None]).sum(1)
        return weights + groups * (self.arch.kv_bytes_per_token * np.asarray(context_tokens, float).reshape(-1, 1))

    def move_bytes(self, old: Choice, new: Choice, context_tokens: float | Floats) -> Floats:
        """KV bytes from edge to cloud and from cloud to edge, [N, 2], as `migration.diff` says.

        Weights are staged; a copy that is there already does not move. Ranges of one device contain each other, as the
        edge always holds the first heads, so that counts say all.
        """
        before, after = self._groups[self._codes(old)[0]], self._groups[self._codes(new)[0]]
        gained = (np.maximum(0, after - before) * self.sizes[:, None]).sum(1)[:, ::-1]
        return gained * (self.arch.kv_bytes_per_token * np.asarray(context_tokens, float).reshape(-1, 1))

    def plan(
        self,
        rates: Rates,
        *,
        context_tokens: float | Floats,
        per_second: Floats,
        per_joule: Floats,
        request: RequestShape | None,
        memory_bytes: Floats,
        allowed: Bools | None = None,
        current: Choice | None = None,
        move_s_per_byte: Floats | None = None,
        move_weight: Floats | None = None,
    ) -> Choice:
        """The cheapest placement of each instance for one slot, by the program of plan.py.

        Args:
            rates: of the two devices, N instances or one.
            context_tokens: tokens in the KV cache, a number or [N].
            per_second: what a second of a token weighs, idling included, [N].
            per_joule: what a joule above idling weighs, [N].
            request: the mean request, if a token is to pay its share of the prompt.
            memory_bytes: room on each device, [N, 2]; a hard limit.
            allowed: modes that each group may take, [N, G, 4], at least one each; all by default.
            current: what is active; each group whose KV moves then pays for it.
            move_s_per_byte: seconds of a KV byte from edge to cloud and back, [N, 2].
            move_weight: what a second of moving weighs, [N]; 1 by default.

        Returns:
            Choices that fit and obey the mask; all on the cloud, else all on the edge, where the program finds none.
            All on the cloud also where nothing fits.
        """
        kept = None if current is None else self._codes(current)
        program = Program(
            self.arch, self.topology, self.sizes, self.units, rates, codec=self.codec, context_tokens=context_tokens,
            per_second=per_second, per_joule=per_joule, request=request,
            current=None if kept is None else (kept[0] - self._attention, kept[1] - self._ffn),
        )  # fmt: skip
        if kept is not None and move_s_per_byte is not None:
            weight = np.ones(len(per_second)) if move_weight is None else move_weight
            program.charge_moves(self._groups[kept[0]], move_s_per_byte * np.asarray(weight)[:, None])
        if allowed is not None:
            assert allowed.any(2).all(), "each group needs a mode that it may take"
            program.forbid(~allowed)
        return program.best(memory_bytes)


def _edge_share(shares: Shares, edge: str, cloud: str) -> float:
    return shares.count(edge) / (shares.count(edge) + shares.count(cloud))


def _check(arch: ModelArch, topology: Topology) -> None:
    ids: Sequence[str] = topology.ids
    linked = len(ids) == 2 and all(topology.link(topology.ids[i], topology.ids[1 - i]) for i in (0, 1))
    if not linked:
        raise TopologyError(
            "topology",
            expected="two devices with links both ways",
            actual=f"{list(ids)}, {len(topology.links)} links",
            remedy="use the planners exact or drift_plus_penalty for other clusters",
        )
    for trait in ("parallel_block", "qk_norm_over_heads"):
        if getattr(arch, trait):
            raise ModelError(
                arch.name,
                expected="layers of attention followed by an FFN, without an exchange inside attention",
                actual=trait,
                remedy="use the planners exact or drift_plus_penalty for this model",
            )
