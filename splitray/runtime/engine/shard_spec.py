"""What a device is to hold, from a placement and its route."""

from __future__ import annotations

from collections.abc import Sequence

from splitray.arch import ModelArch
from splitray.model.surgery import LayerShare, ShardSpec
from splitray.placement import Placement, Shares
from splitray.route import Route, SubBlock
from splitray.topology import DeviceId


def shard_spec(
    placement: Placement, arch: ModelArch, route: Route, order: Sequence[DeviceId], device: str
) -> ShardSpec | None:
    """What a device holds (`order`: the topology's devices); None for an origin that only gets tokens."""
    blocks = {(b.kind, b.layer): b for b in route.sub_blocks}
    following = {b.index: nxt for b, nxt in zip(route.sub_blocks, route.sub_blocks[1:], strict=False)}

    def first(shares: Shares, total: int) -> bool:
        holders = shares.devices
        if shares.is_replicated(total):
            return device in holders
        return device == next(d for d in order if d in holders)

    def settles(block: SubBlock) -> bool:
        who = following[block.index].devices if block.mode == "partitioned" else block.devices
        return arch.post_norm and device in who

    layers = []
    for i, layer in enumerate(placement.layers):
        posts = (False, False)
        if not arch.parallel_block:
            posts = (settles(blocks["attention", i]), settles(blocks["ffn", i]))
        layers.append(
            LayerShare(
                groups=layer.attention.ranges(device),
                columns=layer.ffn.ranges(device),
                attention_bias=first(layer.attention, arch.num_kv_heads),
                ffn_bias=first(layer.ffn, arch.ffn_dim),
                attention_post=posts[0],
                ffn_post=posts[1],
            )
        )
    if device not in placement.devices:
        return None
    return ShardSpec(
        layers=tuple(layers),
        embedding=device in placement.embedding,
        vocab_rows=placement.head.ranges(device),
    )
