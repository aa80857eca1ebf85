"""Two baselines that deal pieces out without a cost: in turn, and to the fastest device that has room."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

from splitray.arrays import Ints
from splitray.errors import listed
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.memory import (
    embedding_bytes,
    ffn_unit_bytes,
    group_bytes,
    layer_bytes,
    no_room,
    shares_table,
    table_bytes,
)
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import layers_on, served_first
from splitray.topology import DeviceId


class _Room:
    """Bytes left on each device, and how a piece finds its place."""

    def __init__(self, state: ClusterState) -> None:
        self.state = state
        self.left = {d.id: d.memory_bytes for d in state.topology.devices}

    def take(self, candidates: Iterable[DeviceId], num_bytes: Ints, piece: str) -> DeviceId:
        """The first candidate with room for a piece of so many bytes on each device, [D].

        Raises:
            PlacementError: none has room.
        """
        for device in candidates:
            needed = int(num_bytes[self.state.topology.index[device]])
            if self.left[device] >= needed:
                self.left[device] -= needed
                return device
        expected = f"room for {piece} of {self.state.arch.name}: {num_bytes.min():,} bytes on one device"
        left = f"left are {listed([f'{b:,.0f} on {d}' for d, b in self.left.items()])}"
        raise no_room(expected, left, "add a device or memory, shorten the context, or use the planner proportional")

    def head(self, first: DeviceId, embedding: DeviceId) -> DeviceId:
        """The head's device: pinned, or the first with room from `first` on; free beside a tied embedding."""
        state = self.state
        if shares_table(state)[state.topology.index[embedding]] and embedding in (first, state.pinned_head):
            return embedding
        candidates = [state.pinned_head] if state.pinned_head else [first, *self.left]
        return self.take(candidates, table_bytes(state), "the head")


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Every head group and every FFN to the next device in turn that has room; the embedding on the origin."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no device has room for a piece."""
        arch, ids, room = state.arch, state.topology.ids, _Room(state)
        embedding = room.take([state.topology.origin], embedding_bytes(state), "the embedding")
        turn = 0

        def next_one(num_bytes: Ints, piece: str) -> DeviceId:
            nonlocal turn
            chosen = room.take(chain(islice(ids, turn, None), islice(ids, turn)), num_bytes, piece)
            turn = (state.topology.index[chosen] + 1) % len(ids)
            return chosen

        layers, group, columns = [], group_bytes(state), arch.ffn_dim * ffn_unit_bytes(state)
        for _ in range(arch.num_layers):
            groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for g in range(arch.num_kv_heads):
                groups[next_one(group, "a head group")].append((g, g + 1))
            ffn = next_one(columns, "an FFN")
            layers.append(LayerPlacement(Shares.of(groups), Shares.whole(arch.ffn_dim, ffn)))
        head = room.head(ids[turn], embedding)
        return Placement(tuple(layers), (embedding,), Shares.whole(arch.vocab, head))


@dataclass(frozen=True, slots=True)
class Greedy:
    """Whole layers in order, each to the fastest device that still has room; those that the origin reaches first."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no device has room for a layer."""
        order, room = served_first(state), _Room(state)
        first = [state.pinned_embedding] if state.pinned_embedding else order
        embedding = room.take(first, embedding_bytes(state), "the embedding")
        each = layer_bytes(state)
        layers = [room.take(order, each, "a layer") for _ in range(state.arch.num_layers)]
        return layers_on(layers, embedding, room.head(layers[-1], embedding), state)
