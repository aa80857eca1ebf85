"""Placements that are measured under a name: those of the bench, and the demo's uneven one."""

from splitray.arch import ModelArch
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.topology import Topology


def placements(arch: ModelArch, topology: Topology) -> dict[str, Placement]:
    """Halves, replicated attention, one cut, one device: what the engine's bench runs as well."""
    a, b = topology.ids
    layers = arch.num_layers

    def half(total: int) -> Shares:
        return Shares.of({a: [(0, total // 2)], b: [(total // 2, total)]})

    def all_on(device: str) -> LayerPlacement:
        return LayerPlacement(Shares.whole(arch.num_kv_heads, device), Shares.whole(arch.ffn_dim, device))

    halves = LayerPlacement(half(arch.num_kv_heads), half(arch.ffn_dim))
    replicated = LayerPlacement(Shares.whole(arch.num_kv_heads, a, b), half(arch.ffn_dim))
    cut = tuple(all_on(a if i < layers // 2 else b) for i in range(layers))
    return {
        "split_half": Placement((halves,) * layers, (a,), half(arch.vocab)),
        "replicated": Placement((replicated,) * layers, (a,), half(arch.vocab)),
        "replicated_whole_head": Placement((replicated,) * layers, (a,), Shares.whole(arch.vocab, a)),
        "layer_cut": Placement(cut, (a,), Shares.whole(arch.vocab, b)),
        "one_device": Placement((all_on(a),) * layers, (a,), Shares.whole(arch.vocab, a)),
    }


def uneven_placement(arch: ModelArch, topology: Topology) -> Placement:
    """A placement as an edge device would have it: few heads, fewer columns the later the layer, and the embedding.

    The first layer's attention is on both devices: one exchange less, and a second copy of its KV.
    """
    edge, cloud = topology.ids
    groups = max(1, arch.num_kv_heads // 4) if arch.num_kv_heads > 1 else 0

    def shared(total: int, first: int) -> Shares:
        return Shares.of({edge: [(0, first)], cloud: [(first, total)]})

    def layer(index: int) -> LayerPlacement:
        columns = arch.ffn_dim * (3 * arch.num_layers - 2 * index) // (8 * arch.num_layers)
        attention = shared(arch.num_kv_heads, groups)
        if index == 0 and not arch.parallel_block:
            attention = Shares.whole(arch.num_kv_heads, edge, cloud)
        return LayerPlacement(attention, shared(arch.ffn_dim, columns))

    layers = tuple(layer(i) for i in range(arch.num_layers))
    return Placement(layers, (edge,), shared(arch.vocab, arch.vocab // 4))
