"""Planners that split every sub-block over devices, evenly or in proportion to speed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

from splitray.arrays import Ints
from splitray.errors import InputError, PlacementError, listed
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.layer_times import layer_times
from splitray.planners.memory import (
    embedding_bytes,
    ffn_unit_bytes,
    group_bytes,
    layer_bytes,
    model_bytes,
    no_room,
    shares_table,
    table_bytes,
    vocab_row_bytes,
)
from splitray.planners.protocol import MANY_DEVICES, ClusterState
from splitray.planners.thrift import thrifty_s
from splitray.topology import DeviceId

_MOST_SHARING = 8  # devices; with more, messages take longer than they save


@dataclass(frozen=True, slots=True)
class Even:
    """Every sub-block and the head in shares as equal as whole pieces allow; the embedding on the origin.

    What does not divide goes round the devices from layer to layer, so that the model as a whole is balanced;
    with fewer pieces than devices some devices get none of a layer. Memory is not looked at.
    """

    most_devices: ClassVar[int] = MANY_DEVICES

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; a device too small for its share is named by the check."""
        num_devices = len(state.topology.devices)
        even = [Fraction(1, num_devices)] * num_devices
        return _split_all(state, even, [math.inf] * num_devices, (state.topology.origin,))


@dataclass(frozen=True, slots=True)
class Proportional:
    """Shares in proportion to speed, capped by memory; the embedding on the origin.

    Speed is memory bandwidth, or with `priced` that of a layer in the cost model: the heterogeneity-aware shares of
    tensor parallelism in Galaxy (arXiv 2405.17245, abstract), whose overlap and sequence parallelism are not built.

    A device that its share would overfill is filled, and the rest goes to the others in the same proportion.
    """

    priced: bool = False
    most_devices: ClassVar[int] = MANY_DEVICES

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where the devices together are too small."""
        speeds = [d.memory_bandwidth_bytes_per_s for d in state.topology.devices]
        if self.priced:
            speeds = [1 / float(s) for s in layer_times(state).layer_s]
        return _in_proportion(state, speeds, (state.topology.origin,))


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Galaxy's shares over the devices that are quickest together: the fastest one, two, ..., or with the origin.

    The embedding is on the origin, on the first of them or on each, whatever is quickest; `Proportional(priced=True)`
    has it on the origin and shares over all devices.
    """

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where the devices together are too small, or none of these shares finds its links."""
        where, ids, seconds = state.topology, state.topology.ids, layer_times(state).layer_s
        fastest = sorted(range(len(ids)), key=lambda d: (not where.serves(ids[d]), float(seconds[d])))
        from_origin = sorted(fastest, key=lambda d: ids[d] != where.origin)
        most = range(1, min(len(ids), _MOST_SHARING) + 1)
        best: tuple[float, Placement] | None = None
        for used in dict.fromkeys(tuple(sorted(order[:many])) for order in (fastest, from_origin) for many in most):
            speed = {ids[d]: 1 / float(seconds[d]) for d in used}
            few = replace(state, topology=where.among({where.origin, *speed}))  # the others hold nothing
            speeds = [speed.get(d, 0.0) for d in few.topology.ids]
            tables = [(where.origin,), (ids[used[0]],), tuple(ids[d] for d in used)]
            for table in tables[:1] if state.pinned_embedding else dict.fromkeys(tables):
                try:
                    placement = _in_proportion(few, speeds, table)
                    found = thrifty_s(placement, state), placement
                except InputError:
                    continue
                if best is None or found[0] < best[0]:
                    best = found
        if best is not None:
            return best[1]
        if len(ids) > MANY_DEVICES:
            expected = f"room for {state.arch.name} on at most {_MOST_SHARING} devices, all linked with each other"
            needs = f"a need of {model_bytes(state):,} bytes that none of those tried has"
            raise no_room(expected, needs, "use layer_dp, myopic or drift_plus_penalty, or shorten the context")
        return Proportional(priced=True).propose(state)


def _in_proportion(state: ClusterState, speeds: Sequence[float], embedding: tuple[DeviceId, ...]) -> Placement:
    """Shares in proportion to speeds, 0 for devices that are to hold none, beside the embedding on some of them."""
    arch, devices = state.arch, state.topology.devices
    sizes = zip(table_bytes(state), embedding_bytes(state), arch.num_layers * layer_bytes(state), strict=True)
    shared, room, caps = shares_table(state), [], []
    for i, (device, speed, (table, first, layers)) in enumerate(zip(devices, speeds, sizes, strict=True)):
        holds_table = device.id in embedding
        head_is_free = holds_table and bool(shared[i])
        pinned_head = state.pinned_head == device.id and not head_is_free
        left = device.memory_bytes - first * holds_table - table * pinned_head
        if left < 0:
            raise _too_small(state, f"{table * (1 + pinned_head):,} bytes of pinned tables on {device.id}")
        head = 0 if head_is_free or state.pinned_head else table
        room.append(left if speed > 0 else 0.0)
        caps.append(left / (layers + head) if speed > 0 else 0.0)
    fractions = _water_fill(speeds, caps)
    if fractions is None:
        raise _too_small(state, f"{model_bytes(state):,} bytes")
    return _split_all(state, [Fraction(f) for f in fractions], room, embedding)


@dataclass(slots=True)
class _Rounding:
    """Whole pieces of one kind for each device, layer after layer, each keeping what it is still owed."""

    fractions: Sequence[Fraction]
    owed: list[Fraction] = field(init=False)

    def __post_init__(self) -> None:
        self.owed = [Fraction(0)] * len(self.fractions)

    def split(self, total: int, room: Sequence[int]) -> list[int] | None:
        """Counts that sum to `total`, at most `room` each, nearest to what is owed; None without room."""
        owed = [o + f * total for o, f in zip(self.owed, self.fractions, strict=True)]
        given = [max(0, min(math.floor(o), r)) for o, r in zip(owed, room, strict=True)]
        while (missing := total - sum(given)) != 0:
            step = 1 if missing > 0 else -1
            able = [i for i, g in enumerate(given) if (g < room[i] if step > 0 else g > 0)]
            if not able:
                return None
            given[max(able, key=lambda i: step * (owed[i] - given[i]))] += step  # ties in device order
        self.owed = [o - g for o, g in zip(owed, given, strict=True)]
        return given


def _split_all(
    state: ClusterState, fractions: Sequence[Fraction], room_bytes: Sequence[float], embedding: tuple[DeviceId, ...]
) -> Placement:
    arch, ids = state.arch, state.topology.ids
    left = list(room_bytes)

    def rows(total: int, unit_bytes: Ints, repeat: int, free_on: tuple[DeviceId, ...] = ()) -> list[Shares]:
        each = zip(ids, fractions, unit_bytes.tolist(), strict=True)
        costs = [0 if d in free_on and f > 0 else n for d, f, n in each]
        rounding = _Rounding(fractions)
        found = []
        for _ in range(repeat):
            room = [_units(b, c, total) for b, c in zip(left, costs, strict=True)]
            counts = rounding.split(total, room)
            if counts is None:
                raise _too_small(state, f"{model_bytes(state):,} bytes in pieces of up to {unit_bytes.max():,}")
            left[:] = [b - n * c for b, n, c in zip(left, counts, costs, strict=True)]
            found.append(_in_order(ids, counts))
        return found

    free_head = tuple(d for d in embedding if arch.on(d).shares_table)
    kinds = {
        "attention": (arch.num_kv_heads, group_bytes(state), arch.num_layers, ()),
        "ffn": (arch.ffn_dim, ffn_unit_bytes(state), arch.num_layers, ()),
        "head": (arch.vocab, vocab_row_bytes(state), 0 if state.pinned_head else 1, free_head),
    }
    # The largest pieces first: the small ones then fill what rounding left, so that nearly full devices work.
    split = {k: rows(*kinds[k]) for k in sorted(kinds, key=lambda k: -kinds[k][1].max())}
    head = split["head"][0] if not state.pinned_head else Shares.whole(arch.vocab, state.pinned_head)
    layers = zip(split["attention"], split["ffn"], strict=True)
    return Placement(tuple(LayerPlacement(a, f) for a, f in layers), embedding, head)


def _units(left_bytes: float, unit_bytes: int, total: int) -> int:
    return total if left_bytes >= total * unit_bytes else max(0, int(left_bytes // unit_bytes))


def _in_order(ids: Sequence[DeviceId], counts: Sequence[int]) -> Shares:
    shares: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for device, count in zip(ids, counts, strict=True):
        shares[device] = [(start, start + count)]
        start += count
    return Shares.of(shares)


def _water_fill(weights: Sequence[float], caps: Sequence[float]) -> list[float] | None:
    """Fractions of 1 in proportion to the weights, none above its cap; None if the caps sum below 1."""
    fractions = list(caps)
    open_, rest = list(range(len(weights))), 1.0
    while open_:
        level = rest / sum(weights[i] for i in open_)
        full = [i for i in open_ if caps[i] <= level * weights[i]]
        if not full:
            for i in open_:
                fractions[i] = level * weights[i]
            return fractions
        rest -= sum(caps[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return fractions if rest <= 1e-12 else None  # a sum of caps of exactly 1, but for rounding


def _too_small(state: ClusterState, needed: str) -> PlacementError:
    devices = state.topology.devices
    available = listed([f"{d.memory_bytes:,.0f} on {d.id}" for d in devices])
    return no_room(
        f"at most the {sum(d.memory_bytes for d in devices):,.0f} bytes available ({available})",
        f"a need of {needed} for {state.arch.name} with {state.context_tokens} tokens of context",
        "add a device or memory, or shorten the context",
    )
