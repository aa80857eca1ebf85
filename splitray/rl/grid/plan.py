"""The cheapest choice of one slot for N instances: the program of planners/optimum/additive.py on a grid's placements.

A token's cost adds up over sub-blocks if the devices of each are taken to be done together; what comes next depends on
who did the last one: the edge, the cloud, both in parts, or both as copies. All layers of a group are placed alike, so
a group's way to be placed (a variant: how attention is held, and how the FFN is) has one cost for each state before
it. Heads and columns may be whole on either device, or shared so that both finish first if they start together, or as
they are now. The program is exact over these; where memory binds, it is not (chain.py).

Shapes: N instances (last, as numpy is quickest there), G groups (1 where all are alike), A and F ways to hold
attention and FFN, V = A F variants, 3 or 4 states before, E devices of the embedding, D of the head.
"""

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Bools, Floats, Ints
from splitray.codecs import Codec
from splitray.cost import Rates
from splitray.planners.optimum.space import MISSING_S
from splitray.planners.protocol import RequestShape
from splitray.rl.grid.chain import Chains, Path, along, within
from splitray.rl.grid.choice import CLOUD, COPIED, EDGE, SIXTEENTHS, SPLIT, Choice
from splitray.rl.grid.pace import COPIES, PARTS, PairTimes, Passes, PieceWork
from splitray.route import TOKEN_BYTES
from splitray.topology import Topology

_HERE = np.eye(2)
_APART = (_HERE == 0)[..., None]  # embedding and head on different devices


class Program:
    """The program of N instances at their rates and prices."""

    def __init__(
        self,
        arch: ModelArch,
        topology: Topology,
        sizes: Ints,
        units: Ints,
        rates: Rates,
        *,
        codec: Codec,
        context_tokens: float | Floats,
        per_second: Floats,
        per_joule: Floats,
        request: RequestShape | None,
        current: tuple[Ints, Ints] | None,
    ) -> None:
        """Price every variant of every group.

        Of the two devices, powers, the origin and what it must hold are looked at. `sizes` are the layers of each
        group, [G], `units` the FFN units of so many sixteenths, [17]; rates, prices and the request are those of
        `Grid.plan`. `current` says how attention (heads on the edge, or their number and one for copies) and FFN are
        held, [N, G].
        """
        self.arch, self.topology, self.sizes, self.units = arch, topology, sizes, units
        self.num_instances = n = len(per_second)
        self.per_second, self.per_joule = np.asarray(per_second, float), np.asarray(per_joule, float)
        self._context = np.broadcast_to(np.asarray(context_tokens, float), (n,))
        self.pace = PairTimes(arch, topology, rates, n, codec)
        self._origin = topology.ids.index(topology.origin)
        passes = self.pace.passes(self._context, request)
        self._options(passes, current)
        self._price(passes)
        self._ends(passes, request)

    def _options(self, passes: Passes, current: tuple[Ints, Ints] | None) -> None:
        """The ways to hold attention and FFN: counts on both devices [2, G, A or F, N], and states [G, A or F, N]."""
        h, n, total = self.arch.num_kv_heads, self.num_instances, self.arch.ffn_dim
        heads = np.arange(1, max(2, h))[:, None]  # one head cannot be shared: the option is an idle copy of "whole"
        shares = np.arange(1, SIXTEENTHS)[:, None]
        columns = self.units[shares]
        parts = (passes.attention, [heads, h - heads]), (passes.ffn, [columns, total - columns])
        at_h, at_f = (self.pace.busy_s(p.of_token, np.array(c))[:, 0].max(0).argmin(0) for p, c in parts)
        groups, more = (1, 0) if current is None else (len(self.sizes), 1)
        self.attention = attention = np.empty((groups, 4 + more, n), np.int64)
        self.ffn = ffn = np.empty((groups, 3 + more, n), np.int64)
        options = (attention, [0, h, h + 1], heads[at_h, 0]), (ffn, [0, SIXTEENTHS], shares[at_f, 0])
        for ways, fixed, best in options:
            ways[:, : len(fixed)] = np.array(fixed)[:, None]
            ways[:, len(fixed)] = best
        if current is not None:
            attention[:, -1], ffn[:, -1] = current[0].T, current[1].T
        copied, units = attention > h, self.units[ffn]
        on_edge = np.minimum(attention, h)
        self._groups = np.array([on_edge, np.where(copied, h, h - on_edge)])
        self._units = np.array([units, total - units])
        self._held_by = np.where(copied, COPIES, _state(self._groups))
        self._after = _state(self._units)
        whole = attention[:, :, None] * (SIXTEENTHS + 1) + ffn[:, None]
        mode = np.where(whole == h * (SIXTEENTHS + 1) + SIXTEENTHS, EDGE, np.where(whole == 0, CLOUD, SPLIT))
        mode = np.where(copied[:, :, None], COPIED, mode)
        self.mode: Ints = mode.reshape(len(mode), -1, n)

    def _cost(self, passes: Passes, pieces: PieceWork, counts: Ints, state: Ints, before: int) -> Floats:
        """The cost of each way to hold a sub-block after each state before it, [before, G, A or F, N]."""
        flat, at = counts.reshape(2, -1, counts.shape[-1]), state.reshape(-1, state.shape[-1])
        busy = self.pace.busy_s(pieces, flat)  # [2, P, X, N]
        ready = along(passes.arrive_s[:, :, :before], at[None, None, None], axis=3) + busy[:, :, None]
        cost = self.per_second * np.maximum(ready[EDGE], ready[CLOUD])  # [P, before, X, N]
        if self.per_joule.any():
            radio = along(passes.radio_j[:, :before], at[None, None], axis=2)
            work = (busy * self.pace.power_w[:, None, None]).sum(0)
            cost = cost + self.per_joule * (work[:, None] + radio)
        total: Floats = (passes.weight[:, None, None, None] * cost).sum(0)
        return total.reshape(before, *state.shape)

    def _price(self, passes: Passes) -> None:
        """Each variant of each group: its cost after each state, [G, 3, V, N], and its bytes, [2, G, V, N]."""
        attention = self._cost(passes, passes.attention, self._groups, self._held_by, 3)
        ffn = self._cost(passes, passes.ffn, self._units, self._after, 4)
        after = along(ffn[:, :, None], self._held_by[None, :, :, None], axis=0)[0]  # [G, A, F, N]
        first = attention[:, :, :, None] + after
        again = along(first, self._after[None, :, None], axis=0)[0]  # in the middle of a group
        sizes = self.sizes[:, None, None]
        groups, n = len(self.sizes), self.num_instances
        first, again = (x.reshape(*x.shape[:-3], -1, n) for x in (first, again))
        self.cost: Floats = np.moveaxis(first, 0, 1) + ((sizes - 1) * again)[:, None]
        arch = self.arch
        part = arch.weight_bytes(arch.group_params) + arch.kv_bytes_per_token * self._context
        unit = arch.weight_bytes(arch.ffn_unit_params)
        held = (self._groups * part)[:, :, :, None] + (self._units * unit)[:, :, None]
        self.held: Floats = held.reshape(2, len(again), -1, n) * sizes
        state = np.broadcast_to(self._after[:, None], (len(again), self._groups.shape[2], *self._after.shape[1:]))
        self.state: Ints = np.broadcast_to(state.reshape(len(again), -1, n), (groups, self.cost.shape[2], n))
        self.mode = np.broadcast_to(self.mode, self.state.shape)
        self._apart = np.where(state.reshape(len(again), 1, -1, n) == np.arange(3)[:, None, None], 0.0, np.inf)

    def _ends(self, passes: Passes, request: RequestShape | None) -> None:
        """What it costs to begin, [E, 3, N], and to end in each state, [E, 3, D, N], with bytes held, [2, E, D]."""
        arch, n, pins, pace = self.arch, self.num_instances, self.topology.origin_holds, self.pace
        self.start: Floats = np.full((2, 3, n), np.inf)
        self.start[EDGE, EDGE] = self.start[CLOUD, CLOUD] = 0.0
        share = 0.0
        if request is not None:
            share = 1 / request.output_tokens
            way = pace.ways(TOKEN_BYTES * request.prompt_tokens)[2][self._origin]
            self.start[1 - self._origin] += share * self.per_second * way
        row = arch.table_bytes(arch.vocab_row_params) * arch.vocab
        flops = 2 * arch.vocab * arch.vocab_row_params / pace.flops_per_s
        busy = np.maximum(flops, row / pace.bytes_per_s) + pace.launch_s  # [D, N]
        seconds = passes.arrive_s[[EDGE, CLOUD], 0, :3, [EDGE, CLOUD]] + busy[:, None]  # [D, 3, N]
        work = self.per_joule * pace.power_w * busy
        cost = (1 + share) * (self.per_second * seconds + work[:, None])
        cost = cost + self.per_joule * passes.radio_j[0, :3, :2].transpose(1, 0, 2)
        air, _, way = pace.ways(TOKEN_BYTES)
        back = self.per_second * way * _APART  # [E, D, N]
        sent = self.per_joule * pace.radio_w * air * (_APART | (np.arange(2) != self._origin)[:, None])
        self.end: Floats = cost.transpose(1, 0, 2) + (back + sent)[:, None]
        self.bytes_at_ends: Floats = row * (_HERE[:, :, None] + _HERE[:, None] * (1 - arch.shares_table * _HERE))
        if pins != "none":
            self.start[1 - self._origin] = np.inf
        if pins == "embedding_and_head":
            self.end[:, :, 1 - self._origin] = np.inf

    def charge_moves(self, groups: Ints, price_per_byte: Floats) -> None:
        """Let each group pay for KV that it gains: `groups` held now [N, G, 2], prices from edge and from cloud [N, 2].

        Needs `current`, so that staying is among the variants.
        """
        before = groups.transpose(2, 1, 0)[:, :, None]  # [2, G, 1, N]
        gained = np.maximum(0, self._groups - before) * self.arch.kv_bytes_per_token * self._context
        prices = np.minimum(price_per_byte.T, MISSING_S)[::-1, None, None]  # the cloud gains what the edge sends
        paid = np.where(gained > 0, gained * prices, 0.0).sum(0) * self.sizes[:, None, None]  # [G, A, N]
        ways = self._units.shape[2]
        self.cost = self.cost + np.repeat(paid, ways, axis=1)[:, None]

    def forbid(self, modes: Bools) -> None:
        """Take modes away from groups, [N, G, 4]."""
        no = along(modes.transpose(1, 2, 0), self.mode, axis=1)
        self.cost = np.where(no[:, None], np.inf, self.cost)

    def best(self, room_bytes: Floats) -> Choice:
        """The cheapest choices that fit into [N, 2] bytes."""
        room = np.asarray(room_bytes, float).T
        chains = Chains(self.cost, self._apart, self.start, self.end, self.state, self.held, self.bytes_at_ends)
        path = chains.best()
        over = np.flatnonzero((chains.bytes(path) > room).any(0))
        if len(over):
            edge, cloud = (int(np.argmax(self.mode[0, :, 0] == m)) for m in (EDGE, CLOUD))
            tight = chains.take(over)
            path.put(over, within(tight, path.take(over), room[:, over], edge, cloud))
        return self._choice(path)

    def _choice(self, path: Path) -> Choice:
        attention, ffn = np.divmod(path.variant, self.ffn.shape[1])

        def chosen(ways: Ints, which: Ints) -> Ints:
            return along(ways, which[:, None], axis=1)[:, 0].T.copy()

        heads = np.minimum(chosen(self.attention, attention), self.arch.num_kv_heads)
        mode = chosen(self.mode, path.variant).astype(np.int8)
        return Choice(mode, heads, chosen(self.ffn, ffn), path.embedding, path.head)


def _state(counts: Ints) -> Ints:
    """Who holds a sub-block of these counts, [2, ..]."""
    return np.where(counts[CLOUD] == 0, EDGE, np.where(counts[EDGE] == 0, CLOUD, PARTS))
