"""The nearest placement by which a model can be run, where it asks for more than that each piece is somewhere."""

from __future__ import annotations

from dataclasses import replace

from splitray.arch import ModelArch
from splitray.placement import LayerPlacement, Placement, Shares, holders


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
        embedding = tuple(dict.fromkeys([*embedding, *holders(layers), *placement.head.devices]))
    return Placement(tuple(layers), embedding, placement.head)
