"""What runs where, in which order, and which messages cross: compiled once from a Placement.

The engine executes a Route and the cost model prices the same Route, so they cannot disagree. The rule is
The exchange rule stands in ARCHITECTURE.md. It knows neither tensors nor time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitray.arch import ModelArch
from splitray.channel import NoisyChannel
from splitray.codecs import Codec, encoded_bytes
from splitray.errors import TopologyError
from splitray.placement import Placement, Shares
from splitray.topology import DeviceId, Topology

Kind = Literal["embedding", "attention", "ffn", "layer", "head"]
Mode = Literal["whole", "replicated", "partitioned"]
Content = Literal["state", "partial", "partial_and_state", "norm_sums", "best", "logits", "token"]

BEST_BYTES = 8  # float32 maximum and int32 id, for each sequence
TOKEN_BYTES = 4  # int32 id, for each sequence
NORM_SUMS_BYTES = 8  # float32 sums of squares of q and of k, for each position


@dataclass(frozen=True, slots=True)
class SubBlock:
    """One stage of the route: its holders in device order; the first of them is the lead."""

    index: int
    kind: Kind
    layer: int
    devices: tuple[DeviceId, ...]
    mode: Mode

    @property
    def lead(self) -> DeviceId:
        """The device that folds the residual into its partial and adds a row-parallel bias."""
        return self.devices[0]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a boundary; `rows` counts the vocabulary rows of a `logits` message."""

    source: DeviceId
    target: DeviceId
    content: Content
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Boundary:
    """The messages that cross after sub-block `after`; one exchange if there are any.

    `after` equals the head's index for head -> sampler, one more for sampler -> embedding holders and origin.
    An `inner` boundary lies inside the attention of sub-block `after` (norms over all heads).
    """

    after: int
    messages: tuple[Message, ...]
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Execution order of one decode step: sub-blocks, and the boundaries between them.

    `codec` is how partials and states travel (codecs.py), the same at every boundary, and `channel` what happens to
    them on the way (channel.py).
    """

    sub_blocks: tuple[SubBlock, ...]
    boundaries: tuple[Boundary, ...]
    origin: DeviceId
    greedy: bool
    codec: Codec = "none"
    channel: NoisyChannel | None = None

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Every device that takes part, the origin included."""
        named = [d for s in self.sub_blocks for d in s.devices]
        return tuple(dict.fromkeys([self.origin, *named]))

    @property
    def sampler(self) -> DeviceId:
        """The device that chooses the next token: the first holder of the head."""
        return self.sub_blocks[-1].lead

    @property
    def exchanges_per_token(self) -> int:
        """Boundaries that something crosses in one decode step."""
        return sum(bool(b.messages) for b in self.boundaries)

    @property
    def messages_per_token(self) -> int:
        """Messages of one decode step, one for each peer and boundary."""
        return sum(len(b.messages) for b in self.boundaries)

    def bytes_per_token(self, arch: ModelArch, *, batch: int = 1) -> int:
        """Tensor payload of one decode step over all devices, in bytes, without headers."""
        return sum(message_bytes(m, arch, batch=batch, codec=self.codec) for b in self.boundaries for m in b.messages)

    def boundary(self, after: int, *, inner: bool = False) -> Boundary:
        """The boundary after a sub-block (empty if nothing crosses)."""
        found = (b for b in self.boundaries if b.after == after and b.inner == inner)
        return next(found, Boundary(after, (), inner))


def message_bytes(
    message: Message, arch: ModelArch, *, batch: int = 1, positions: int = 1, codec: Codec = "none"
) -> int:
    """Payload of one message for `positions` new tokens of each of `batch` sequences, in bytes."""
    tokens = batch * positions
    match message.content:
        case "state" | "partial":
            each = arch.partial_bytes if message.content == "partial" else arch.dtype_bytes
            return encoded_bytes(codec, tokens * arch.streams, arch.hidden_dim, dtype_bytes=each)
        case "partial_and_state":
            rows = tokens * arch.streams
            coded = encoded_bytes(codec, rows, arch.hidden_dim, dtype_bytes=arch.partial_bytes)
            return coded + rows * arch.hidden_dim * arch.dtype_bytes
        case "norm_sums":
            return tokens * NORM_SUMS_BYTES
        case "best":
            return batch * BEST_BYTES
        case "logits":
            return batch * message.rows * 4
        case "token":
            return batch * TOKEN_BYTES


def compile_route(
    placement: Placement,
    arch: ModelArch,
    topology: Topology,
    *,
    greedy: bool = True,
    codec: Codec = "none",
    channel: NoisyChannel | None = None,
) -> Route:
    """Compile a valid placement into its Route.

    Args:
        placement: must have passed `validate` for this arch and topology.
        arch: the model's counts and traits.
        topology: device order, links and origin.
        greedy: whether a partitioned head sends (max, id) or its logits to the sampler.
        codec: how partials and states travel; a lossy one keeps the residual apart from the lead's partial.
        channel: what happens to them on the way; a noisy one keeps the residual apart too.

    Raises:
        TopologyError: two devices that must exchange have no link.
    """
    blocks = _sub_blocks(placement, arch, topology)
    boundaries: list[Boundary] = []

    def cross(after: int, messages: Sequence[Message], *, inner: bool = False) -> None:
        for m in messages:  # before the next boundary is made: a missing link shows early, messages may be millions
            if topology.link(m.source, m.target) is None:
                raise TopologyError(
                    f"link {m.source} -> {m.target}",
                    expected=f"a link ({m.source} sends to {m.target} after sub-block {after})",
                    actual="none in the topology",
                    remedy="add the link, or place the pieces elsewhere",
                )
        boundaries.append(Boundary(after, tuple(messages), inner))

    for here, there in zip(blocks, blocks[1:], strict=False):
        if arch.qk_norm_over_heads and here.kind == "attention" and here.mode == "partitioned":
            pairs = [(a, b) for a in here.devices for b in here.devices if a != b]
            cross(here.index, [Message(a, b, "norm_sums") for a, b in pairs], inner=True)
        cross(here.index, crossing(here, there, arch, topology, codec, channel))
    head = blocks[-1]
    content: Content = "best" if greedy else "logits"
    cross(head.index, [Message(d, head.lead, content, placement.head.count(d)) for d in head.devices[1:]])
    waiting = _ordered({*blocks[0].devices, topology.origin} - {head.lead}, topology)
    cross(head.index + 1, [Message(head.lead, d, "token") for d in waiting])
    return Route(tuple(blocks), tuple(boundaries), topology.origin, greedy, codec, channel)


def _sub_blocks(placement: Placement, arch: ModelArch, topology: Topology) -> list[SubBlock]:
    blocks: list[SubBlock] = []

    def add(kind: Kind, layer: int, devices: Sequence[DeviceId], replicated: bool) -> None:
        mode: Mode = "whole" if len(devices) == 1 else "replicated" if replicated else "partitioned"
        blocks.append(SubBlock(len(blocks), kind, layer, _ordered(set(devices), topology), mode))

    def shares(kind: Kind, layer: int, s: Shares, total: int) -> None:
        add(kind, layer, s.devices, s.is_replicated(total))

    add("embedding", -1, placement.embedding, True)
    for i, layer in enumerate(placement.layers):
        if arch.parallel_block:
            union = tuple(dict.fromkeys(layer.attention.devices + layer.ffn.devices))
            add("layer", i, union, layer.attention.is_replicated(arch.num_kv_heads))
        else:
            shares("attention", i, layer.attention, arch.num_kv_heads)
            shares("ffn", i, layer.ffn, arch.ffn_dim)
    shares("head", arch.num_layers, placement.head, arch.vocab)
    return blocks


def crossing(
    here: SubBlock,
    there: SubBlock,
    arch: ModelArch,
    topology: Topology,
    codec: Codec,
    channel: NoisyChannel | None = None,
) -> tuple[Message, ...]:
    """The messages between two sub-blocks that follow each other, by the exchange rule of ARCHITECTURE.md."""
    lacking = [d for d in there.devices if d not in here.devices]
    if here.mode != "partitioned":
        num_bytes = encoded_bytes(codec, arch.streams, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
        return tuple(Message(_cheapest(here.devices, d, num_bytes, topology), d, "state") for d in lacking)
    unfolded = arch.post_norm or codec != "none" or channel is not None
    messages = []
    for source in here.devices:
        for target in there.devices:
            if source == target:
                continue
            apart = unfolded and source == here.lead and target in lacking
            messages.append(Message(source, target, "partial_and_state" if apart else "partial"))
    return tuple(messages)


def _cheapest(holders: Sequence[DeviceId], target: DeviceId, num_bytes: int, topology: Topology) -> DeviceId:
    def price(holder: DeviceId) -> float:
        link = topology.link(holder, target)
        return float("inf") if link is None else link.transfer_s(num_bytes)

    return min(holders, key=price)  # min keeps the first of equals: ties in device order


def _ordered(devices: set[DeviceId], topology: Topology) -> tuple[DeviceId, ...]:
    return tuple(sorted((d for d in devices if d in topology.index), key=topology.index.__getitem__))
