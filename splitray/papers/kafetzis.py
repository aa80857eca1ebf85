"""Kafetzis et al. (arXiv 2505.02533): blocks of one decoder layer, the three-phase delay, migration.

Of the paper only the abstract is STATED; the rest is CODE, the author's simulator (MIT, re-implemented from its
formulas, nothing copied), whose comments carry a draft's equation numbers. Numbers E4.k and K1 to K12 are those of
docs/equations.md. With no erratum every form is that of `splitray.cost`, but for a projection that is a block of its
own: our engine slices it with its heads and does not execute this. Knows no planner.
"""

import enum
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitray.arch import ModelArch
from splitray.topology import DeviceId, Topology

Mode = Literal["sum", "max"]
Order = Literal["serial", "parallel"]


class KafetzisErrata(enum.Flag):
    """What the released code does (CODE), one switch each, all off in `CORRECTED`."""

    CACHE_SIZE = enum.auto()  # K1: a head's cache is g D b instead of 2 s d b, and not looked at when ordering
    FFN_TENTH = enum.auto()  # K2: 0.8 s D^2 instead of 8 s D^2
    GIGABITS = enum.auto()  # K3: GB over Gbit/s, eight times too quick (8.6 times if its GB are of 2^30 bytes)
    NO_WEIGHTS = enum.auto()  # K4: projection and FFN have activations only
    RECOMPUTE = enum.auto()  # K5: all s positions are computed anew for each token
    FREE_MIGRATION = enum.auto()  # K6: moves are never counted, nor what the interval will bring
    SOURCE_BAN = enum.auto()  # K7: the source may host no block, while the exact solver may use it
    TOTAL_CAPACITY = enum.auto()  # K8: scores divide by what a device has, not by what it has left
    MULTIPLY_ADDS = enum.auto()  # K9: a multiply-add counts once, over devices rated in FLOP/s
    NO_WEIGHTED_SUM = enum.auto()  # K10: attention is its scores alone
    NO_BROADCASTS = enum.auto()  # K11: the input reaches the heads, and the result the controller, for nothing
    NO_LATENCY = enum.auto()  # K12: a transfer is bytes over rate


AS_CODED = ~KafetzisErrata(0)
CORRECTED = KafetzisErrata(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlock:
    """One movable block of a layer. `operations` are FLOPs, or multiply-adds under that erratum."""

    weight_bytes: float
    activation_bytes: float
    cache_bytes: float
    operations: float
    output_bytes: float

    @property
    def memory_bytes(self) -> float:
        """m_i of E4.5 and E4.8: weights, activations and K/V cache (2ND and CODE)."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlocks:
    """B = H U {ffn} U {proj} of one decoder layer (CODE, 2ND): `head` stands for each of them."""

    head: LayerBlock
    projection: LayerBlock
    ffn: LayerBlock
    input_bytes: float

    def head_with_projection(self, num_heads: int) -> LayerBlock:
        """A head with its slice of the projection, the block that our engine moves (E1.8)."""
        h, p, n = self.head, self.projection, num_heads
        return LayerBlock(
            weight_bytes=h.weight_bytes + p.weight_bytes / n,
            activation_bytes=h.activation_bytes + p.activation_bytes / n,
            cache_bytes=h.cache_bytes,
            operations=h.operations + p.operations / n,
            output_bytes=p.output_bytes,  # a partial sum is as wide as the sum
        )


def layer_blocks(
    arch: ModelArch, *, context_tokens: int, generated_tokens: int | None = None, errata: KafetzisErrata = CORRECTED
) -> LayerBlocks:
    """What the blocks of one layer need in one decode step (corrected: section 1 of docs/equations.md).

    A head is a KV group; of multi-head attention, as in that code, that is one head. For a plain MLP of 4 D every
    as-coded number is the code's; a layer of other widths keeps its own with the same error in it.

    `context_tokens` is s, the tokens in the cache with the new one; `generated_tokens` g of CACHE_SIZE, by default s,
    where the length of the prompt is not known.
    """
    width, element = arch.hidden_dim, arch.dtype_bytes
    positions = context_tokens if KafetzisErrata.RECOMPUTE in errata else 1
    per_multiply_add = 1 if KafetzisErrata.MULTIPLY_ADDS in errata else 2
    queries = arch.heads_per_group * arch.head_dim
    qkv = width * (queries + 2 * arch.head_dim)
    attention = context_tokens * queries * (1 if KafetzisErrata.NO_WEIGHTED_SUM in errata else 2)
    out = width * queries * arch.num_kv_heads
    mlp = arch.ffn_dim * arch.ffn_unit_params
    stored = 0 if KafetzisErrata.NO_WEIGHTS in errata else 1
    generated = context_tokens if generated_tokens is None else generated_tokens
    coded_cache = generated * width * element
    return LayerBlocks(
        head=LayerBlock(
            weight_bytes=arch.weight_bytes(qkv),
            activation_bytes=positions * (queries + 2 * arch.head_dim) * element,
            cache_bytes=coded_cache
            if KafetzisErrata.CACHE_SIZE in errata
            else arch.kv_bytes_per_token * context_tokens,
            operations=per_multiply_add * positions * (qkv + attention),
            output_bytes=positions * queries * element,
        ),
        projection=LayerBlock(
            weight_bytes=stored * arch.weight_bytes(out),
            activation_bytes=positions * width * element,
            cache_bytes=0,
            operations=per_multiply_add * positions * out,
            output_bytes=positions * width * element,
        ),
        ffn=LayerBlock(
            weight_bytes=stored * arch.weight_bytes(mlp),
            activation_bytes=positions * mlp / (arch.ffn_matrices * width) * element,
            cache_bytes=0,
            operations=per_multiply_add * positions * mlp / (10 if KafetzisErrata.FFN_TENTH in errata else 1),
            output_bytes=positions * width * element,
        ),
        input_bytes=positions * width * element,
    )


@dataclass(frozen=True, slots=True)
class BlockAssignment:
    """The binary assignment of one layer's blocks at one interval (2ND, CODE): a device for each head, and two more."""

    heads: tuple[DeviceId, ...]
    projection: DeviceId
    ffn: DeviceId


def transfer_s(
    topology: Topology, source: DeviceId, target: DeviceId, num_bytes: float, *, errata: KafetzisErrata = CORRECTED
) -> float:
    """One message: bytes over rate (CODE), with the link's latency unless NO_LATENCY; infinite without a link."""
    if source == target:
        return 0.0
    link = topology.link(source, target)
    if link is None:
        return float("inf")
    counted = num_bytes / 8 if KafetzisErrata.GIGABITS in errata else num_bytes
    return counted / link.bandwidth_bytes_per_s if KafetzisErrata.NO_LATENCY in errata else link.transfer_s(counted)


def inference_s(
    layers: Sequence[BlockAssignment],
    blocks: LayerBlocks,
    topology: Topology,
    *,
    mode: Mode = "sum",
    errata: KafetzisErrata = CORRECTED,
) -> float:
    """D_inf of one token (E4.1 to E4.4, CODE; layers in a row are INFERRED): heads, then projection, then FFN.

    The origin is the controller. Unless NO_BROADCASTS, it sends the input to the devices with heads of the first layer,
    each FFN does so for the next layer, and the last one returns its output (INFERRED).

    There is one assignment a layer (the released code has a single one), and all layers need the same blocks. `mode`
    says how transfers of one phase add up; `max` needs links that share no medium.
    """
    total, holder = 0.0, topology.origin
    together = sum if mode == "sum" else max
    send = KafetzisErrata.NO_BROADCASTS not in errata
    for layer in layers:
        count = Counter(layer.heads)
        if send:
            total += together(transfer_s(topology, holder, d, blocks.input_bytes, errata=errata) for d in count)
        total += max(n * _seconds(topology, d, blocks.head) for d, n in count.items())
        total += together(
            transfer_s(topology, d, layer.projection, n * blocks.head.output_bytes, errata=errata)
            for d, n in count.items()
        )
        total += _seconds(topology, layer.projection, blocks.projection)
        total += transfer_s(topology, layer.projection, layer.ffn, blocks.projection.output_bytes, errata=errata)
        total += _seconds(topology, layer.ffn, blocks.ffn)
        holder = layer.ffn
    return total + (
        transfer_s(topology, holder, topology.origin, blocks.ffn.output_bytes, errata=errata) if send else 0
    )


def _seconds(topology: Topology, device: DeviceId, block: LayerBlock) -> float:
    where = topology.device(device)
    return block.operations / (where.compute_flops * where.compute_efficiency)


def migration_s(
    before: BlockAssignment,
    after: BlockAssignment,
    blocks: LayerBlocks,
    topology: Topology,
    *,
    order: Order = "parallel",
    errata: KafetzisErrata = CORRECTED,
) -> float:
    """D_mig between two assignments of one layer (E4.5: m_i / R, 2ND; E4.6: the order is INFERRED).

    `serial` adds all moves, `parallel` those of one link and takes the slowest link. FREE_MIGRATION makes it zero,
    which is what the released code adds.
    """
    if KafetzisErrata.FREE_MIGRATION in errata:
        return 0.0
    pairs = [(a, b, blocks.head) for a, b in zip(before.heads, after.heads, strict=True)]
    pairs += [(before.projection, after.projection, blocks.projection), (before.ffn, after.ffn, blocks.ffn)]
    by_link: dict[tuple[DeviceId, DeviceId], float] = defaultdict(float)
    for source, target, block in pairs:
        by_link[source, target] += transfer_s(topology, source, target, block.memory_bytes, errata=errata)
    return sum(by_link.values()) if order == "serial" else max(by_link.values())


def hosts(topology: Topology, errata: KafetzisErrata = CORRECTED) -> tuple[DeviceId, ...]:
    """Devices that may hold a block: all of them, or under SOURCE_BAN all but the origin (CODE)."""
    return tuple(d for d in topology.ids if KafetzisErrata.SOURCE_BAN not in errata or d != topology.origin)
