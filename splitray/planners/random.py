"""Random valid placements: what tests and comparisons draw from. Knows no cost."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitray.errors import listed
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.memory import ffn_unit_bytes, group_bytes, model_bytes, no_room, vocab_row_bytes
from splitray.planners.protocol import MANY_DEVICES, ClusterState
from splitray.topology import DeviceId

_DRAWS = 24  # of a whole placement; the later half without replicas, which cost memory
_SHARE_DRAWS = 4  # of one sub-block, before its pieces go wherever room is left


@dataclass(frozen=True, slots=True)
class RandomPlanner:
    """A new random placement a call: each sub-block whole, in uneven scattered ranges, or replicated.

    Draws that overfill a device are thrown away, a bounded number of times.
    """

    rng: np.random.Generator
    most_devices: ClassVar[int] = MANY_DEVICES

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no draw fits into memory."""
        for attempt in range(_DRAWS):
            placement = _Draw(state, self.rng, may_replicate=attempt < _DRAWS // 2).placement()
            if placement is not None:
                return placement
        available = listed([f"{d.memory_bytes:,.0f} on {d.id}" for d in state.topology.devices])
        needs = f"a need of {model_bytes(state):,} bytes and none that fits in {_DRAWS} draws"
        remedy = "add memory or a device, shorten the context, or use the planner proportional"
        raise no_room(f"a random placement of {state.arch.name} within {available} bytes", needs, remedy)


class _Draw:
    """One attempt: what room is left, and what must still find room."""

    def __init__(self, state: ClusterState, rng: np.random.Generator, *, may_replicate: bool) -> None:
        arch = state.arch
        self.state, self.rng, self.may_replicate = state, rng, may_replicate
        self.ids = state.topology.ids
        self.left = {d.id: d.memory_bytes for d in state.topology.devices}
        self.waiting_bytes = model_bytes(state)  # of pieces not yet placed, each counted once
        self.group_bytes = group_bytes(arch, state.context_tokens)
        self.unit_bytes = ffn_unit_bytes(arch)
        self.table_bytes = arch.vocab * vocab_row_bytes(arch)

    def placement(self) -> Placement | None:
        """A placement within memory, or None where this attempt ran out of room."""
        arch = self.state.arch
        embedding = self._embedding()
        head = self._head(embedding) if embedding else None
        layers: list[LayerPlacement] = []
        while head and len(layers) < arch.num_layers:
            layer = self._layer()
            if layer is None:
                return None
            layers.append(layer)
        return Placement(tuple(layers), embedding, head) if head else None

    def _embedding(self) -> tuple[DeviceId, ...]:
        """One holder, sometimes two; empty if no device has room."""
        pinned = self.state.pinned_embedding
        candidates = [pinned] if pinned else self._several(len(self.ids))
        held = tuple(d for d in candidates if self.left[d] >= self.table_bytes)
        for wanted in (2, 1) if self.may_replicate and self.rng.random() < 0.25 else (1,):
            cost = dict.fromkeys(held[:wanted], self.table_bytes)
            if cost and self._take(cost, self.table_bytes):
                return tuple(cost)
        return ()

    def _head(self, embedding: tuple[DeviceId, ...]) -> Shares | None:
        tied = self.state.arch.shares_table
        free = embedding if tied else ()
        row_bytes = vocab_row_bytes(self.state.arch)
        # A tied table is counted once, with the embedding; rows of it elsewhere come on top.
        once = 0 if tied else self.table_bytes
        if self.state.pinned_head:
            shares = Shares.whole(self.state.arch.vocab, self.state.pinned_head)
            return shares if self._take_shares(shares, row_bytes, once, free) else None
        return self._shares(self.state.arch.vocab, row_bytes, once, free)

    def _layer(self) -> LayerPlacement | None:
        arch = self.state.arch
        groups, columns = arch.num_kv_heads, arch.ffn_dim
        both = groups * self.group_bytes, columns * self.unit_bytes
        if arch.parallel_block and self._wants_replicas():
            devices = self._several(int(self.rng.integers(2, len(self.ids) + 1)))
            if self._take(dict.fromkeys(devices, sum(both)), sum(both)):
                return LayerPlacement(Shares.whole(groups, *devices), Shares.whole(columns, *devices))
        attention = self._sub_block(groups, self.group_bytes)
        ffn = self._sub_block(columns, self.unit_bytes) if attention else None
        return LayerPlacement(attention, ffn) if attention and ffn else None

    def _sub_block(self, total: int, unit_bytes: int) -> Shares | None:
        if not self.state.arch.parallel_block and self._wants_replicas():
            shares = Shares.whole(total, *self._several(int(self.rng.integers(2, len(self.ids) + 1))))
            if self._take_shares(shares, unit_bytes, total * unit_bytes):
                return shares
        return self._shares(total, unit_bytes, total * unit_bytes)

    def _wants_replicas(self) -> bool:
        return self.may_replicate and len(self.ids) > 1 and bool(self.rng.random() < 0.25)

    def _shares(self, total: int, unit_bytes: int, once: int, free: tuple[DeviceId, ...] = ()) -> Shares | None:
        """Whole on one device or scattered over several; where room is left if no such draw fits."""
        for _ in range(_SHARE_DRAWS):
            num_devices = 1 if self.rng.random() < 0.4 else int(self.rng.integers(1, len(self.ids) + 1))
            shares = self._scattered(total, self._several(min(num_devices, total)))
            if self._take_shares(shares, unit_bytes, once, free):
                return shares
        return self._where_room_is(total, unit_bytes, once, free)

    def _scattered(self, total: int, devices: list[DeviceId]) -> Shares:
        """Uneven ranges, in no order; each device gets at least one."""
        num_ranges = int(self.rng.integers(len(devices), min(total, 3 * len(devices)) + 1))
        cuts = sorted(int(c) + 1 for c in self.rng.choice(total - 1, num_ranges - 1, replace=False))
        owners = list(devices)
        owners += [devices[int(i)] for i in self.rng.integers(0, len(devices), num_ranges - len(devices))]
        ranges: dict[str, list[tuple[int, int]]] = {}
        order = self.rng.permutation(num_ranges)
        for i, start, stop in zip(order, [0, *cuts], [*cuts, total], strict=True):
            ranges.setdefault(owners[int(i)], []).append((start, stop))
        return Shares.of(ranges)

    def _where_room_is(self, total: int, unit_bytes: int, once: int, free: tuple[DeviceId, ...]) -> Shares | None:
        ranges: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for device in self._several(len(self.ids)):
            fits = device in free or self.left[device] >= (total - start) * unit_bytes
            stop = total if fits else start + int(max(0.0, self.left[device]) // unit_bytes)
            ranges[device] = [(start, stop)]
            start = stop
        shares = Shares.of(ranges)
        return shares if start == total and self._take_shares(shares, unit_bytes, once, free) else None

    def _several(self, num_devices: int) -> list[DeviceId]:
        return [self.ids[int(i)] for i in self.rng.permutation(len(self.ids))[:num_devices]]

    def _take_shares(self, shares: Shares, unit_bytes: int, once: int, free: tuple[DeviceId, ...] = ()) -> bool:
        cost = {d: 0 if d in free else shares.count(d) * unit_bytes for d in shares.devices}
        return self._take(cost, once)

    def _take(self, cost_bytes: dict[DeviceId, int], once: int) -> bool:
        """Book the bytes if every device has room and the rest, `once` bytes less than before, finds some."""
        waiting = self.waiting_bytes - once
        if any(self.left[d] < n for d, n in cost_bytes.items()):
            return False
        if sum(self.left.values()) - sum(cost_bytes.values()) < waiting:
            return False
        for device, num_bytes in cost_bytes.items():
            self.left[device] -= num_bytes
        self.waiting_bytes = waiting
        return True
