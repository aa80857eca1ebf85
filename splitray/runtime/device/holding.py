"""What one device holds in one epoch: its slices, its side of the exchange rule, and the KV of every session.

A device has one that runs and, while a re-placement is under way, a second one that shares all that both hold.
Decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitray.arch import Range
from splitray.errors import DeviceLost, InputError
from splitray.model.folder import is_here
from splitray.model.kv_cache import KvCache, KvPiece, sliding_windows
from splitray.model.lengths import LengthRule
from splitray.model.reading import read_config
from splitray.model.slice_reader import Source
from splitray.model.state_dict_source import StateDictSource
from splitray.model.surgery import Shard
from splitray.runtime.device.crossing import Crossing, Junction
from splitray.runtime.device.lending import Lent
from splitray.runtime.device.noisy import crossing_of
from splitray.runtime.wire import Wire
from splitray.runtime.wire.messages import Assignment, Lender

_BEHIND_S = 1.0  # that a device may be behind the sampler


@dataclass(slots=True)
class Holding:
    """See above. `caches` are by session, `windows` say which layers attend to a window only."""

    assignment: Assignment
    source: Source
    shard: Shard | None
    crossing: Crossing
    head_rows: dict[str, Tensor]
    windows: tuple[bool, ...]
    caches: dict[int, KvCache] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The number of the placement that this is part of."""
        return self.assignment.epoch

    @property
    def num_layers(self) -> int:
        """Layers of the whole model, held here or not; one that has several caches counts for each."""
        return self.assignment.arch.num_layers * self.assignment.arch.kv_slots

    @property
    def rule(self) -> LengthRule:
        """What of the model depends on the length."""
        return LengthRule() if self.shard is None else self.shard.rope.rule

    def cache(self, session: int, capacity: int) -> KvCache:
        """A session's cache, made if there is none."""
        if session not in self.caches:
            windows = self.windows or (False,) * self.num_layers
            self.caches[session] = KvCache(num_layers=self.num_layers, windows=windows, capacity=capacity)
        return self.caches[session]

    def groups(self, layer: int) -> tuple[Range, ...]:
        """The KV head groups that are held of a layer."""
        spec = self.assignment.spec
        return () if spec is None else spec.layers[layer // self.assignment.arch.kv_slots].groups

    def adopt(self, other: Holding, session: int) -> None:
        """Share the KV of layers of which both hold the same groups."""
        cache, old = self.cache(session, other.caches[session].capacity), other.caches[session]
        for layer in range(self.num_layers):
            if self.groups(layer) and self.groups(layer) == other.groups(layer):
                cache.adopt(layer, old)

    def read(self, session: int, piece: KvPiece, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Copies of keys and values, positions [start, stop); None if there are none.

        Raises:
            DeviceLost: the session is not that far here, and does not get there soon. A device is behind where others
                do not wait for its copy, and where it reads tokens again.
        """
        cache, give_up = self.caches.get(session), time.monotonic() + _BEHIND_S
        while cache is None or cache.written < stop:
            if time.monotonic() > give_up:
                raise DeviceLost(f"position {stop} of session {session} is not written yet")
            time.sleep(0.001)
            cache = self.caches.get(session)
        held = self.groups(piece.layer)
        at, groups = _place(held, piece.groups), sum(r.count for r in held)
        return cache.piece(piece.layer, at, piece.groups.count, start, stop, groups=groups)

    def write(self, session: int, piece: KvPiece, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values of a session that has a cache here."""
        held = self.groups(piece.layer)
        where = self.crossing.torch_device
        groups, count = sum(r.count for r in held), piece.groups.count
        at, moved = _place(held, piece.groups), (keys.to(where), values.to(where))
        self.caches[session].put(piece.layer, at, count, groups, start, *moved)


def build(
    assignment: Assignment,
    *,
    device: str,
    wire: Wire,
    junction: Junction,
    memory: StateDictSource | None = None,
    old: Holding | None = None,
    ready: Holding | None = None,
    lenders: Sequence[Lender] = (),
    token: bytes = b"",
) -> Holding:
    """Read what a device is to hold and does not hold yet.

    Args:
        assignment: what to hold.
        device: this one.
        wire: of this device.
        junction: that its shards exchange through.
        memory: gives weights instead of a model folder.
        old: what it holds of the same model now.
        ready: what it holds in case another device is lost.
        lenders: devices whose disks may have the model, if this one's has not.
        token: to dial them.

    Raises:
        InputError: the model or the torch device cannot be used.
    """
    from splitray.model.opened import open_checkpoint

    if old is not None and old.assignment.model_path != assignment.model_path:
        old = None
    source: Source
    if old is not None:
        source = old.source
        if isinstance(source, Lent):
            source.renew(lenders)
    elif memory is not None or is_here(assignment.model_path) or not lenders:
        source = memory or open_checkpoint(assignment.model_path)
    else:
        source = Lent(lenders, token=token, model_path=assignment.model_path)
    crossing = crossing_of(device, assignment.route, assignment.arch, wire)
    crossing.torch_device = torch.device(assignment.torch_device)
    rows_of = assignment.head_rows.items()
    head_rows = {d: torch.cat([torch.arange(r.start, r.stop) for r in rows]) for d, rows in rows_of}
    shard: Shard | None = None
    windows: tuple[bool, ...] = ()
    if assignment.spec is not None:
        config = source.config if isinstance(source, StateDictSource | Lent) else read_config(assignment.model_path)
        if assignment.torch_device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(
                f"torch_device of {device}",
                expected="a CUDA device on that node",
                actual="none",
                remedy="set torch_device: cpu",
            )
        before = None if old is None else old.shard
        windows = sliding_windows(config, config.num_hidden_layers)
        held = (x.shard for x in (old, ready) if x is not None and x.shard is not None)
        if (known := next((s for s in held if s.spec == assignment.spec), None)) is not None:
            shard = known
        else:
            shard = Shard(
                config=config,
                arch=assignment.arch,
                layout=assignment.layout,
                spec=assignment.spec,
                source=source,
                exchange=junction,
                torch_device=assignment.torch_device,
                reuse=before,
            )
            if assignment.lean:
                shard.make_lean(None if before is None else before.lean)
    return Holding(assignment, source, shard, crossing, head_rows, windows)


def _place(held: Sequence[Range], wanted: Range) -> int:
    """Where a range of groups begins among the local ones."""
    at = 0
    for r in held:
        if r.start <= wanted.start and wanted.stop <= r.stop:
            return at + wanted.start - r.start
        at += r.count
    raise AssertionError(f"{wanted} is not within {held}")
