"""What must move between two placements, in bytes, and how long that takes. Moves nothing itself.

A head group moves together with its KV cache (arXiv 2505.02533, STATED). Weights travel only where they are not
staged on the target already (every device reads its own copy of the checkpoint).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from splitray.arch import ModelArch, Range
from splitray.placement import Placement, Shares
from splitray.topology import DeviceId, Topology

Piece = Literal["embedding", "attention", "ffn", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A range of one sub-block that `target` holds from now on and did not hold before.

    `source` is the first of the old holders in device order; a replicated piece has several, each with the same KV.
    """

    piece: Piece
    layer: int
    indices: Range
    source: DeviceId
    target: DeviceId
    weight_bytes: int
    kv_bytes: int


def diff(old: Placement, new: Placement, arch: ModelArch, context_tokens: int) -> tuple[Move, ...]:
    """The moves from one valid placement to another, with the KV of `context_tokens` tokens."""
    return tuple(_moves(old, new, arch, context_tokens))


def _moves(old: Placement, new: Placement, arch: ModelArch, context_tokens: int) -> Iterator[Move]:
    kv = arch.kv_bytes_per_token * context_tokens

    def row(device: DeviceId) -> int:
        return arch.on(device).table_bytes(arch.vocab_row_params)

    def group(device: DeviceId) -> int:
        return arch.on(device).weight_bytes(arch.group_params)

    def unit(device: DeviceId) -> int:
        return arch.on(device).weight_bytes(arch.ffn_unit_params)

    known: dict[tuple[Shares, Shares], list[tuple[DeviceId, DeviceId, Range]]] = {}  # layers are often alike

    def moves(
        piece: Piece, layer: int, before: Shares, after: Shares, weight: Callable[[DeviceId], int], cache: int
    ) -> Iterator[Move]:
        if (before, after) not in known:
            known[before, after] = [(s, t, r) for t, held in after.by_device for s, r in _gained(before, t, held)]
        for source, target, indices in known[before, after]:
            n = indices.count
            yield Move(
                piece=piece, layer=layer, indices=indices, source=source, target=target,
                weight_bytes=n * weight(target), kv_bytes=n * cache,
            )  # fmt: skip

    table_before, table_after = (Shares.whole(arch.vocab, *p.embedding) for p in (old, new))
    yield from moves("embedding", -1, table_before, table_after, row, 0)
    for i, (before, after) in enumerate(zip(old.layers, new.layers, strict=True)):
        yield from moves("attention", i, before.attention, after.attention, group, kv)
        yield from moves("ffn", i, before.ffn, after.ffn, unit, 0)
    yield from moves("head", arch.num_layers, old.head, new.head, row, 0)


def _gained(before: Shares, target: DeviceId, after: Sequence[Range]) -> Iterator[tuple[DeviceId, Range]]:
    """What `target` did not hold before, cut where the old holder changes."""
    kept = before.ranges(target)
    edges = sorted({e for _, ranges in before.by_device for r in ranges for e in r} | {e for r in after for e in r})
    for start, stop in zip(edges, edges[1:], strict=False):
        wanted = any(r.start <= start < r.stop for r in after)
        if not wanted or any(r.start <= start < r.stop for r in kept):
            continue
        holders = (d for d, ranges in before.by_device if any(r.start <= start < r.stop for r in ranges))
        source = next(holders, None)
        assert source is not None, "a valid placement covers every index"
        yield source, Range(start, stop)


def reformatted(old: Placement, new: Placement, arch: ModelArch) -> tuple[Move, ...]:
    """The moves whose target holds weights in another format than the source: their numbers are rounded otherwise."""
    if not arch.device_weights:
        return ()

    def differ(move: Move) -> bool:
        a, b = (arch.on(d).format for d in (move.source, move.target))
        return a.table != b.table if move.piece in ("embedding", "head") else a != b

    return tuple(m for m in diff(old, new, arch, 0) if differ(m))


def moved_bytes(moves: Sequence[Move], *, staged: bool) -> int:
    """Bytes over links: the KV, and the weights unless they are staged on their targets."""
    return sum(m.kv_bytes + (0 if staged else m.weight_bytes) for m in moves)


def delay_s(moves: Sequence[Move], topology: Topology, *, staged: bool) -> float:
    """Time of all moves: links side by side, moves of one link (or medium) in a row (docs/equations.md E4.6).

    Infinite where a move needs a link that the topology lacks.
    """
    by_link: dict[object, float] = defaultdict(float)
    latency = 0.0
    for m in moves:
        num_bytes = m.kv_bytes + (0 if staged else m.weight_bytes)
        if not num_bytes:
            continue
        link = topology.link(m.source, m.target)
        if link is None:
            return float("inf")
        by_link[link.medium or (m.source, m.target)] += num_bytes / link.bandwidth_bytes_per_s
        latency = max(latency, link.rtt_s / 2 + link.exchange_s)
    return max(by_link.values(), default=0.0) + latency
