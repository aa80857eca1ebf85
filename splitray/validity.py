"""Whether a model can be run by a placement: each piece once, in a device's memory, and what else some models ask.

Those others keep a layer in one piece, read the KV of another layer, or embed tokens for every layer. Knows no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitray.arch import ModelArch
from splitray.errors import PlacementError
from splitray.placement import LayerPlacement, Placement, Shares, weight_bytes
from splitray.topology import DeviceId, Topology


def validate(placement: Placement, arch: ModelArch, topology: Topology) -> None:
    """Check that the placement covers the model once, names known devices, and fits their memory.

    Raises:
        PlacementError: says which piece, what was expected, what came and what to do.
    """
    if len(placement.layers) != arch.num_layers:
        raise PlacementError(
            "layers",
            expected=f"{arch.num_layers} of {arch.name}",
            actual=len(placement.layers),
            remedy="give one entry a layer",
        )
    for device in placement.devices:
        if device not in topology.ids:
            raise PlacementError(
                "placement",
                expected=f"devices among {list(topology.ids)}",
                actual=device,
                remedy="correct the device's name or add it to the topology",
            )
    if not placement.embedding or len(set(placement.embedding)) != len(placement.embedding):
        raise PlacementError(
            "embedding",
            expected="at least one device, each once",
            actual=list(placement.embedding),
            remedy="name each holder of the embedding once",
        )
    i = 0
    for layer, count in placement.runs():
        _covered(layer.attention, arch.num_kv_heads, f"layer {i} attention", "head groups")
        _covered(layer.ffn, arch.ffn_dim, f"layer {i} ffn", "experts" if arch.num_experts else "columns")
        if arch.parallel_block:
            _one_sub_block(layer, arch, i)
        i += count
    _covered(placement.head, arch.vocab, "head", "vocabulary rows")
    if placement.head.is_replicated(arch.vocab):
        raise PlacementError(
            "head",
            expected="one holder or disjoint rows",
            actual="a full copy on several devices",
            remedy="give each device its own vocabulary rows",
        )
    _within_limits(placement, arch)
    if topology.origin_holds != "none":
        _pinned(placement, topology)
    for device, needed in weight_bytes(placement, arch).items():
        available = topology.device(device).memory_bytes
        if needed > available:
            raise PlacementError(
                f"memory of {device}",
                expected=f"at most {available:,.0f} bytes of weights",
                actual=f"{needed:,.0f} bytes",
                remedy="move pieces to another device",
            )


def fitted(placement: Placement, arch: ModelArch) -> Placement:
    """The nearest placement that the model can be run by: FFNs follow their attention, and readers of KV its owner."""
    if not (arch.whole_layers or arch.kv_layers or arch.tokens_everywhere):
        return placement
    layers = list(placement.layers)
    for i, layer in enumerate(layers):
        source = layers[arch.kv_layers[i]] if arch.kv_layers else layer
        if arch.whole_layers:
            layers[i] = LayerPlacement(source.attention, Shares.whole(arch.ffn_dim, *source.attention.devices))
        elif source.attention != layer.attention:
            layers[i] = replace(layer, attention=source.attention)
    embedding = placement.embedding
    if arch.tokens_everywhere:
        embedding = tuple(dict.fromkeys([*embedding, *_holders(layers), *placement.head.devices]))
    return Placement(tuple(layers), embedding, placement.head)


def _covered(shares: Shares, total: int, where: str, unit: str) -> None:
    for device, ranges in shares.by_device:
        for r in ranges:
            if not 0 <= r.start < r.stop <= total:
                raise PlacementError(
                    f"{where} on {device}",
                    expected=f"ranges within [0, {total}) {unit}",
                    actual=f"[{r.start}, {r.stop})",
                    remedy="correct the range",
                )
    if shares.is_replicated(total):
        return
    taken = sorted((r, d) for d, ranges in shares.by_device for r in ranges)
    end, holder = 0, DeviceId("")
    for r, device in taken:
        if r.start < end:
            raise PlacementError(
                where,
                expected=f"each of {total} {unit} on one device, or all of them on each",
                actual=f"[{r.start}, {min(end, r.stop)}) on {holder} and on {device}",
                remedy="make the ranges disjoint, or replicate the whole sub-block",
            )
        if r.start > end:
            break
        end, holder = r.stop, device
    if end != total:
        gap = next((r.start for r, _ in taken if r.start > end), total)
        raise PlacementError(
            where,
            expected=f"all {total} {unit} placed",
            actual=f"[{end}, {gap}) on no device",
            remedy="add the missing range to a device",
        )


def _one_sub_block(layer: LayerPlacement, arch: ModelArch, index: int) -> None:
    attention, ffn = layer.attention.is_replicated(arch.num_kv_heads), layer.ffn.is_replicated(arch.ffn_dim)
    same = set(layer.attention.devices) == set(layer.ffn.devices)
    if (attention or ffn) and not (attention and ffn and same):
        raise PlacementError(
            f"layer {index}",
            expected=f"attention and FFN replicated together, on the same devices ({arch.name} "
            "computes both from one input)",
            actual="one of them replicated, or on other devices",
            remedy="replicate both on the same devices, or partition both",
        )


def _pinned(placement: Placement, topology: Topology) -> None:
    held = {"embedding": placement.embedding}
    if topology.origin_holds == "embedding_and_head":
        held["head"] = placement.head.devices
    for piece, devices in held.items():
        if devices != (topology.origin,):
            raise PlacementError(
                piece,
                expected=f"on the origin {topology.origin} (origin_holds: {topology.origin_holds})",
                actual=list(devices),
                remedy="place it there, or set origin_holds: none",
            )


def _within_limits(placement: Placement, arch: ModelArch) -> None:
    for i, layer in enumerate(placement.layers):
        if arch.whole_layers and set(layer.attention.devices) != set(layer.ffn.devices):
            _refuse(f"layer {i}", f"attention and FFN on the same devices ({arch.name} is cut between layers only)",
                    f"{_named(layer.attention)} and {_named(layer.ffn)}")  # fmt: skip
        owner = arch.kv_layers[i] if arch.kv_layers else i
        if layer.attention != placement.layers[owner].attention:
            _refuse(f"layer {i} attention", f"as in layer {owner}, whose keys and values it reads",
                    f"{_named(layer.attention)} and not {_named(placement.layers[owner].attention)}")  # fmt: skip
    holders = [*_holders(placement.layers), *placement.head.devices]
    missing = [d for d in dict.fromkeys(holders) if d not in placement.embedding]
    if arch.tokens_everywhere and missing:
        _refuse("embedding", f"on every device ({arch.name} embeds tokens for each layer)",
                f"not on {', '.join(missing)}")  # fmt: skip


def _holders(layers: Sequence[LayerPlacement]) -> list[DeviceId]:
    return list(dict.fromkeys(d for x in layers for d in (*x.attention.devices, *x.ffn.devices)))


def _named(shares: Shares) -> str:
    return ", ".join(f"{[list(r) for r in ranges]} on {d}" for d, ranges in shares.by_device)


def _refuse(what: str, expected: str, actual: str) -> None:
    raise PlacementError(what, expected=expected, actual=actual, remedy="place it there, or let a planner place it")
