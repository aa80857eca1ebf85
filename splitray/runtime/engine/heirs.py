"""Who takes the pieces of lost devices where they must keep their format: a device that holds its own weights alike.

Pure: from a placement to another one.
"""

from __future__ import annotations

from splitray.arch import ModelArch, Range
from splitray.errors import PlacementError
from splitray.migration import reformatted
from splitray.placement import LayerPlacement, Placement, Shares, validate, weight_bytes
from splitray.topology import DeviceId, Topology


def refuse_new_formats(before: Placement, after: Placement, arch: ModelArch) -> None:
    """Refuse a placement by which pieces of a session that lives would be held in another format.

    Raises:
        PlacementError: says which piece of them.
    """
    for move in reformatted(before, after, arch)[:1]:
        was, now = (arch.on(d).format.name for d in (move.source, move.target))
        where = move.piece if move.piece in ("embedding", "head") else f"layer {move.layer} {move.piece}"
        raise PlacementError(
            f"{where} on {move.target}",
            expected=f"a device that holds {was} weights, as {move.source}: a session's pieces keep their format",
            actual=now,
            remedy="move it when no session lives, or give both devices the same `weights:`",
        )


def inherited(placement: Placement, arch: ModelArch, left: Topology) -> Placement:
    """What the devices that are not `left` held goes to the largest of the same format that has room for all of it.

    Raises:
        PlacementError: there is none.
    """
    for lost in (d for d in placement.devices if d not in left.index):
        kind = arch.on(lost).format
        alike = sorted((d for d in left.devices if arch.on(d.id).format == kind), key=lambda d: -d.memory_bytes)
        tried = ((d, _with_heir(placement, arch, lost, d.id)) for d in alike)
        found = next((p for d, p in tried if weight_bytes(p, arch)[d.id] <= d.memory_bytes), None)
        if found is None:
            raise PlacementError(
                f"the pieces of {lost}",
                expected=f"room on a device that holds {kind.name} weights: a session's pieces keep their format",
                actual=", ".join(f"{d.id} in {arch.on(d.id).format.name}" for d in left.devices),
                remedy=f"bring {lost} back, or give another device the same `weights:`",
            )
        placement = found
    validate(placement, arch, left)
    return placement


def _with_heir(placement: Placement, arch: ModelArch, lost: DeviceId, heir: DeviceId) -> Placement:
    def passed_on(shares: Shares, total: int) -> Shares:
        held: dict[str, tuple[Range, ...]] = {d: r for d, r in shares.by_device if d != lost}
        if lost not in shares.devices or shares.is_replicated(total):
            return Shares.of(held)
        return Shares.of({**held, heir: (*held.get(heir, ()), *shares.ranges(lost))})

    layers = tuple(
        LayerPlacement(passed_on(x.attention, arch.num_kv_heads), passed_on(x.ffn, arch.ffn_dim))
        for x in placement.layers
    )
    kept = tuple(d for d in placement.embedding if d != lost)
    return Placement(layers, kept or (heir,), passed_on(placement.head, arch.vocab))
