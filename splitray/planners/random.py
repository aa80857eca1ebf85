"""Random valid placements: what tests and comparisons draw from. Knows no cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitray.errors import listed
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.memory import (
    embedding_bytes,
    ffn_unit_bytes,
    group_bytes,
    model_bytes,
    no_room,
    vocab_row_bytes,
)
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
        self.state, self.rng = state, rng
        self.may_replicate = may_replicate and not arch.device_weights  # copies are in one format
        self.ids = state.topology.ids
        self.left = {d.id: d.memory_bytes for d in state.topology.devices}
        self.waiting_bytes = model_bytes(state)  # of pieces not yet placed, each counted once
        self.group_bytes, self.unit_bytes, self.row_bytes, self.table_bytes = (
            dict(zip(self.ids, each.tolist(), strict=True))
            for each in (group_bytes(state), ffn_unit_bytes(state), vocab_row_bytes(state), embedding_bytes(state))
        )

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
        held = tuple(d for d in candidates if self.left[d] >= self.table_bytes[d])
        for wanted in (2, 1) if self.may_replicate and self.rng.random() < 0.25 else (1,):
            cost = {d: self.table_bytes[d] for d in held[:wanted]}
            if cost and self._take(cost, min(self.table_bytes.values())):
                return tuple(cost)
        return ()

    def _head(self, embedding: tuple[DeviceId, ...]) -> Shares | None:
        arch = self.state.arch
        free = tuple(d for d in embedding if arch.on(d).shares_table)
        # A table that is shared is counted once, with the embedding; rows of it elsewhere come on top.
        once = 0 if free else arch.vocab * min(self.row_bytes.values())
        if self.state.pinned_head:
            shares = Shares.whole(arch.vocab, self.state.pinned_head)
            return shares if self._take_shares(shares, self.row_bytes, once, free) else None
        return self._shares(arch.vocab, self.row_bytes, once, free)

    def _layer(self) -> LayerPlacement | None:
        arch = self.state.arch
        groups, columns = arch.num_kv_heads, arch.ffn_dim
        both = {d: groups * self.group_bytes[d] + columns * self.unit_bytes[d] for d in self.ids}
        if arch.parallel_block and self._wants_replicas():
            devices = self._several(int(self.rng.integers(2, len(self.ids) + 1)))
            if self._take({d: both[d] for d in devices}, min(both.values())):
                return LayerPlacement(Shares.whole(groups, *devices), Shares.whole(columns, *devices))
        attention = self._sub_block(groups, self.group_bytes)
        ffn = self._sub_block(columns, self.unit_bytes) if attention else None
        return LayerPlacement(attention, ffn) if attention and ffn else None

    def _sub_block(self, total: int, unit_bytes: Mapping[DeviceId, int]) -> Shares | None:
        if not self.state.arch.parallel_block and self._wants_replicas():
            shares = Shares.whole(total, *self._several(int(self.rng.integers(2, len(self.ids) + 1))))
            if self._take_shares(shares, unit_bytes, total * min(unit_bytes.values())):
                return shares
        return self._shares(total, unit_bytes, total * min(unit_bytes.values()))

    def _wants_replicas(self) -> bool:
        return self.may_replicate and len(self.ids) > 1 and bool(self.rng.random() < 0.25)

    def _shares(
        self, total: int, unit_bytes: Mapping[DeviceId, int], once: int, free: tuple[DeviceId, ...] = ()
    ) -> Shares | None:
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

    def _where_room_is(
        self, total: int, unit_bytes: Mapping[DeviceId, int], once: int, free: tuple[DeviceId, ...]
    ) -> Shares | None:
        ranges: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for device in self._several(len(self.ids)):
            fits = device in free or self.left[device] >= (total - start) * unit_bytes[device]
            stop = total if fits else start + int(max(0.0, self.left[device]) // unit_bytes[device])
            ranges[device] = [(start, stop)]
            start = stop
        shares = Shares.of(ranges)
        return shares if start == total and self._take_shares(shares, unit_bytes, once, free) else None

    def _several(self, num_devices: int) -> list[DeviceId]:
        return [self.ids[int(i)] for i in self.rng.permutation(len(self.ids))[:num_devices]]

    def _take_shares(
        self, shares: Shares, unit_bytes: Mapping[DeviceId, int], once: int, free: tuple[DeviceId, ...] = ()
    ) -> bool:
        cost = {d: 0 if d in free else shares.count(d) * unit_bytes[d] for d in shares.devices}
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
