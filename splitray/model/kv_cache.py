"""Keys and values of one device's head groups: allocated once, written by position.

It answers to the calls that transformers' attention and mask code make of a cache. Writing by position makes a
repeated step harmless. Windows of sliding layers live in the mask; nothing is evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitray.arch import Range
from splitray.arrays import Floats32


@dataclass(frozen=True, slots=True)
class KvPiece:
    """The KV of some groups of a layer, of one session.

    `layer` counts caches: where layers have several each (`ModelArch.kv_slots`), those of one follow each other.
    """

    layer: int
    groups: Range


@dataclass(frozen=True, slots=True)
class Place:
    """Where one row of a step stands: whose KV it reads, and the position at which it writes."""

    cache: KvCache
    position: int


def places_of(cache: KvCache, new_tokens: int) -> list[Place]:
    """Those of the positions that a step opened in one session."""
    return [Place(cache, cache.position + i) for i in range(new_tokens)]


class KvCache:
    """KV of the local head groups, [batch, groups, capacity, head_dim] for each layer that has any."""

    is_compileable = False

    def __init__(self, *, num_layers: int, windows: tuple[bool, ...], capacity: int) -> None:
        """Allocate nothing yet: shapes come with the first write of each layer."""
        self.capacity = capacity
        self.position = 0
        self.length = 0
        self.written = 0
        """Positions of steps that are over: others may read them while the next step runs."""
        self.longest = 0
        """The length of the longest step, where a model depends on it (lengths.py)."""
        self.is_sliding = list(windows)
        self.is_linear = [False] * num_layers
        self.is_dummy = [False] * num_layers
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self._arrays: list[tuple[Floats32, Floats32] | None] = [None] * num_layers

    def begin(self, position: int, new_tokens: int) -> None:
        """Open a step: all layers write at `position`, whichever of them this device holds."""
        self.position = position
        self.length = position + new_tokens
        if self.length > self.capacity:
            self.grow(max(self.length, 2 * self.capacity))

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is written."""
        for stored in (self.keys, self.values):
            for i, tensor in enumerate(stored):
                if tensor is not None:
                    wider = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
                    wider[:, :, : tensor.shape[2]] = tensor
                    stored[i] = wider
        self.capacity = capacity
        self._arrays = [None] * len(self._arrays)

    def slots(self, layer: int, batch: int, groups: int, dims: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """The whole key and value buffers of a layer, allocated on first use."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = self.keys[layer] = like.new_empty((batch, groups, self.capacity, dims[0]))
            values = self.values[layer] = like.new_empty((batch, groups, self.capacity, dims[1]))
        return keys, values

    def arrays(self, layer: int, groups: int, head_dim: int) -> tuple[Floats32, Floats32]:
        """Keys and values of one sequence's layer as numpy views [groups, capacity, head_dim], allocated if need be."""
        held = self._arrays[layer]
        if held is None:
            keys, values = self.slots(layer, 1, groups, (head_dim, head_dim), torch.empty(0))
            held = self._arrays[layer] = (keys[0].numpy(), values[0].numpy())
        return held

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, groups, new, head_dim]; return all up to the step's end."""
        batch, groups = key.shape[:2]
        keys, values = self.slots(layer_idx, batch, groups, (key.shape[3], value.shape[3]), key)
        keys[:, :, self.position : self.length] = key
        values[:, :, self.position : self.length] = value
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions whose keys and values were written before this step."""
        return self.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the step's first new token."""
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key positions, offset of the first of them)."""
        return self.position + query_length, 0

    def reorder(self, order: Tensor) -> None:
        """Let sequence i continue from what sequence order[i] has (beam search; also widens a batch)."""
        for stored in (self.keys, self.values):
            for i, tensor in enumerate(stored):
                if tensor is not None:
                    stored[i] = tensor.index_select(0, order.to(tensor.device))
        self._arrays = [None] * len(self._arrays)

    def piece(
        self, layer: int, at: int, count: int, start: int, stop: int, *, groups: int
    ) -> tuple[Tensor, Tensor] | None:
        """A copy of keys and values of `count` of the local groups from `at`, positions [start, stop); None without.

        A group has one head, or several where a layer is cut into fewer pieces than it has KV heads.

        Positions that a running step does not write may be read from another thread.
        """
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            return None
        each = keys.shape[1] // groups
        return tuple(t[:, at * each : (at + count) * each, start:stop].cpu().contiguous() for t in (keys, values))  # type: ignore[return-value]

    def put(self, layer: int, at: int, count: int, groups: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write `count` groups [batch, heads, positions, head_dim] from `at` and `start` on, of `groups` in all."""
        batch, heads, positions = keys.shape[:3]
        each = heads // count
        known = self.keys[layer]
        if known is not None and len(known) != batch:  # beams that were made since a first copy
            self.keys[layer] = self.values[layer] = self._arrays[layer] = None
        if start + positions > self.capacity:  # it has become longer than was said
            self.grow(start + positions)
        held = self.slots(layer, batch, groups * each, (keys.shape[3], values.shape[3]), keys)
        for slots, new in zip(held, (keys, values), strict=True):
            slots[:, at * each : (at + count) * each, start : start + positions] = new

    def adopt(self, layer: int, other: KvCache) -> None:
        """Share a layer's memory with a cache of the same groups."""
        if other.capacity > self.capacity:
            self.grow(other.capacity)
        self.keys[layer], self.values[layer] = other.keys[layer], other.values[layer]
        self._arrays[layer] = None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        held = [t for t in (*self.keys, *self.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def sliding_windows(config: object, num_layers: int) -> tuple[bool, ...]:
    """Which layers attend to a window only, as their config says."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return tuple(t == "sliding_attention" for t in types[:num_layers])
    return (getattr(config, "sliding_window", None) is not None,) * num_layers
