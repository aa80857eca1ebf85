"""One placement as devices run it: the orders that stage it beside the one before, and that switch to it.

Pure: from placements to orders. What is asked of whom is decided here, asking is the engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from splitray.arch import ModelArch, Range
from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import ModelError
from splitray.model.kv_cache import KvPiece
from splitray.model.layout import Layouts
from splitray.placement import Placement
from splitray.route import Route, compile_route
from splitray.runtime.checkpoint import Saved
from splitray.runtime.engine.shard_spec import shard_spec
from splitray.runtime.wire import Endpoint
from splitray.runtime.wire.answers import Staged
from splitray.runtime.wire.messages import Assignment, KvSource, Lender, StageOrder, Succeeding, SwitchOrder
from splitray.topology import DeviceId, Topology

LOAD_S = 600.0  # of silence from a device that reads its slices


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A numbered placement, and all that a device needs to take its part in it."""

    number: int
    placement: Placement
    topology: Topology
    route: Route
    arch: ModelArch
    layout: Layouts
    model_path: str
    codec: Codec
    channel: NoisyChannel | None = None
    lean: bool

    @staticmethod
    def of(
        number: int,
        placement: Placement,
        topology: Topology,
        *,
        arch: ModelArch,
        codec: Codec,
        channel: NoisyChannel | None = None,
        **rest: Any,
    ) -> Epoch:
        """With its route compiled."""
        route = compile_route(placement, arch, topology, codec=codec, channel=channel)
        return Epoch(number=number, placement=placement, topology=topology, route=route, arch=arch, codec=codec,
                     channel=channel, **rest)  # fmt: skip

    def moved(self, placement: Placement, topology: Topology, number: int) -> Epoch:
        """The same model otherwise placed."""
        route = compile_route(placement, self.arch, topology, codec=self.codec, channel=self.channel)
        return replace(self, number=number, placement=placement, topology=topology, route=route)

    def assignment(self, device: str) -> Assignment:
        """What a device is to hold."""
        at = self.topology.device(DeviceId(device))
        return Assignment(
            model_path=at.model_path or self.model_path,
            arch=self.arch.on(device),
            layout=self.layout,
            spec=shard_spec(self.placement, self.arch, self.route, self.topology.ids, device),
            route=self.route,
            head_rows={str(d): ranges for d, ranges in self.placement.head.by_device},
            torch_device=at.torch_device,
            lean=self.lean,
            epoch=self.number,
        )

    def lenders(self, device: str, endpoints: Mapping[str, Endpoint]) -> tuple[Lender, ...]:
        """The other devices that may have the model on their disks: see runtime/device/lending.py."""
        paths = {str(d.id): d.model_path or self.model_path for d in self.topology.devices}
        return tuple(
            Lender(device=d, endpoint=e, model_path=paths[d])
            for d, e in endpoints.items() if d != device and d in paths
        )  # fmt: skip

    def dials(self) -> list[tuple[str, str]]:
        """(who opens, to whom) for every pair that exchanges: the edge side opens, it may sit behind NAT."""
        order = self.topology.ids
        pairs = {frozenset((m.source, m.target)) for b in self.route.boundaries for m in b.messages}

        def rank(device: DeviceId) -> tuple[bool, int]:
            return self.topology.device(device).tier == "cloud", order.index(device)

        return [(a, b) for a, b in (sorted(pair, key=rank) for pair in sorted(pairs, key=sorted))]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A session whose KV has to be there in the next epoch too: positions [start, stop) are to be copied.

    Pieces that no living device holds come from `files` in `store`, or not at all.
    """

    number: int
    capacity: int
    stop: int
    start: int = 0
    files: tuple[Saved, ...] = ()
    store: str | None = None


@dataclass
class Next:
    """An epoch on its way, and what it took. `done` is set at the end, with `error` if it came to nothing."""

    epoch: Epoch
    copies_kv: bool = True
    """Whether the run's KV is copied; if not, the new placement reads its tokens again."""
    lasting: bool = False
    """Whether its topology is from now on all that there is to be."""
    sessions: list[Kept] = field(default_factory=list)
    staged: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    stage_s: float = 0.0
    copy_s: float = 0.0
    pause_s: float = 0.0
    staged_bytes: int = 0
    tail_bytes: int = 0

    def fail(self, error: Exception) -> None:
        """It will not run."""
        self.error = error
        self.done.set()


def stage_orders(
    epoch: Epoch, now: Epoch, sessions: Sequence[Kept], endpoints: Mapping[str, Endpoint],
    void: frozenset[str] = frozenset(),
) -> dict[str, StageOrder]:  # fmt: skip
    """For each device of an epoch. Devices in `void` hold nothing of the epoch that runs now."""
    return {
        str(d): StageOrder(
            assignment=epoch.assignment(d),
            lenders=epoch.lenders(d, endpoints),
            sessions=tuple(_succeeding(s, epoch, now, d, endpoints, void) for s in sessions),
        )
        for d in epoch.route.devices
    }


def switch_orders(
    epoch: Epoch, before: Epoch | None, sessions: Sequence[Kept], endpoints: Mapping[str, Endpoint], *, spin_s: float,
) -> dict[str, SwitchOrder]:  # fmt: skip
    """For each device; connections that the epoch before has are kept."""
    known = set(before.dials()) if before is not None else set()
    dials = [d for d in epoch.dials() if d not in known]
    return {
        str(device): SwitchOrder(
            epoch=epoch.number,
            dial={b: endpoints[b] for a, b in dials if a == device},
            expect=tuple(a for a, b in dials if b == device),
            spin_s=spin_s,
            sessions=tuple(
                _succeeding(s, epoch, before, device, endpoints, frozenset()) for s in sessions if before is not None
            ),
        )
        for device in epoch.route.devices
    }


def kv_sources(
    now: Placement,
    then: Placement,
    target: str,
    void: frozenset[str],
    *,
    kv_layers: tuple[int, ...] = (),
    slots: int = 1,
) -> dict[str | None, tuple[KvPiece, ...]]:
    """Where a device gets the KV of groups that it is to hold: pieces by source.

    The source may be itself, where only the layout changes, or None, where all who had it are gone. Layers whose groups
    stay as they are need nothing, nor those that have no KV of their own (`kv_layers` names whose they read). A layer
    has `slots` caches.
    """
    found: dict[str | None, list[KvPiece]] = {}
    for layer, (before, after) in enumerate(zip(now.layers, then.layers, strict=True)):
        if kv_layers and kv_layers[layer] != layer:
            continue
        device = DeviceId(target)
        wanted = after.attention.ranges(device)
        if target not in void and before.attention.ranges(device) == wanted:
            continue
        for group in (g for r in wanted for g in range(r.start, r.stop)):
            holders = [
                str(d) for d, ranges in before.attention.by_device if any(r.start <= group < r.stop for r in ranges)
            ]
            living = sorted((d for d in holders if d not in void), key=lambda d: d != target)
            pieces = found.setdefault(living[0] if living else None, [])
            start = group
            if pieces and pieces[-1].layer == layer and pieces[-1].groups.stop == group:
                start = pieces.pop().groups.start
            pieces.append(KvPiece(layer, Range(start, group + 1)))
    return {
        source: tuple(KvPiece(p.layer * slots + slot, p.groups) for p in pieces for slot in range(slots))
        for source, pieces in found.items()
    }


def _succeeding(
    session: Kept, epoch: Epoch, now: Epoch, device: str, endpoints: Mapping[str, Endpoint], void: frozenset[str]
) -> Succeeding:
    sources = kv_sources(now.placement, epoch.placement, device, void, kv_layers=epoch.arch.kv_layers,
                         slots=epoch.arch.kv_slots)  # fmt: skip
    lost = sources.pop(None, ())
    return Succeeding(
        id=session.number, capacity=session.capacity, start=session.start, stop=session.stop,
        sources=tuple(
            KvSource(device=d, endpoint=endpoints[d], epoch=now.number, pieces=pieces)
            for d, pieces in sources.items() if d is not None
        ),
        lost=lost, files=session.files if lost else (), store=session.store,
    )  # fmt: skip


def the_same_weights(answers: Mapping[str, Staged], before: str | None) -> str:
    """Refuse devices that read different checkpoints, or another one than was read `before`.

    Returns:
        The fingerprint of all.

    Raises:
        ModelError: says who has which.
    """
    prints = {d: a.fingerprint for d, a in answers.items()}
    right = before or next(iter(prints.values()))
    wrong = {d: found for d, found in prints.items() if found != right}
    if wrong:
        error = ModelError(
            "weights of the devices",
            expected="the same checkpoint on every device",
            actual=prints if before is None else {**wrong, "the others": right},
            remedy="copy one checkpoint to every model_path",
        )
        error.devices = tuple(wrong) if before is not None else ()
        raise error
    return right
