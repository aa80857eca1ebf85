"""The nearest placement by which a model can be run, where it asks for more than that each piece is somewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from splitray.arch import ModelArch
from splitray.placement import LayerPlacement, Placement, Shares, holders
from splitray.weight_formats import ROWS


def fitted(placement: Placement, arch: ModelArch) -> Placement:
    """The nearest placement that the model can be run by.

    FFNs follow their attention, readers of KV its owner, and quantised matrices are cut where their format allows it.
    """
    if arch.is_quantised:
        placement = _cut_at_borders(placement, arch)
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
        embedding = tuple(dict.fromkeys([*embedding, *holders(layers), *placement.head.devices]))
    return Placement(tuple(layers), embedding, placement.head)


def _cut_at_borders(placement: Placement, arch: ModelArch) -> Placement:
    """Every cut of FFN columns and vocabulary rows moved to the nearest border of the format."""
    rows = [*range(0, arch.vocab, ROWS), arch.vocab]
    layers = placement.layers
    if arch.ffn_cuts:
        moved = {layer.ffn: _moved(layer.ffn, arch.ffn_cuts) for layer in layers}
        layers = tuple(replace(layer, ffn=moved[layer.ffn]) for layer in layers)
    return Placement(layers, placement.embedding, _moved(placement.head, rows))


def _moved(shares: Shares, borders: Sequence[int]) -> Shares:
    def nearest(cut: int) -> int:
        at = bisect_left(borders, cut)
        return min(borders[max(0, at - 1) : at + 1], key=lambda border: abs(border - cut))

    moved = {d: [(nearest(r.start), nearest(r.stop)) for r in ranges] for d, ranges in shares.by_device}
    kept = {d: [r for r in ranges if r[0] < r[1]] for d, ranges in moved.items()}
    return Shares.of({d: ranges for d, ranges in kept.items() if ranges})
