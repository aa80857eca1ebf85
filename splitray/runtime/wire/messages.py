"""Everything the caller and the devices say to each other besides frames: small frozen orders, plain on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitray.arch import ModelArch, Range
from splitray.channel import NoisyChannel
from splitray.errors import DeviceLost, InputError, ModelError, PlacementError, TopologyError
from splitray.model.layout import LayerLayout
from splitray.model.surgery import LayerShare, ShardSpec
from splitray.placement import Placement, Shares
from splitray.route import Boundary, Message, Route, SubBlock
from splitray.topology import DeviceId

_ERRORS = {e.__name__: e for e in (InputError, ModelError, PlacementError, TopologyError)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """What a device needs to become a shard: the model, its wiring, what it holds, and the route."""

    model_path: str
    arch: ModelArch
    layout: LayerLayout
    spec: ShardSpec | None
    route: Route
    head_rows: dict[str, tuple[Range, ...]]
    torch_device: str = "cpu"
    lean: bool = True
    core: int | None = None
    epoch: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Lists, dicts and scalars only."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> LoadOrder:
        """The inverse of to_plain."""
        layout = dict(plain["layout"])
        layout["ffn"] = tuple(layout["ffn"])
        layout["attention_arguments"] = tuple(tuple(p) for p in layout["attention_arguments"])
        spec = plain["spec"]
        return LoadOrder(
            model_path=plain["model_path"],
            arch=ModelArch(**plain["arch"]),
            layout=LayerLayout(**layout),
            spec=None if spec is None else _spec(spec),
            route=_route(plain["route"]),
            head_rows={d: _ranges(r) for d, r in plain["head_rows"].items()},
            torch_device=plain["torch_device"],
            lean=plain["lean"],
            core=plain["core"],
            epoch=plain["epoch"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOrder:
    """Generate up to `max_new_tokens` for a batch, the devices among themselves.

    A run may go on after a pause: then the prompt ends with the `done` tokens of each sequence that are generated
    already, and the caches hold the positions below `start`.
    """

    session: int
    attempt: int
    epoch: int
    prompt: list[list[int]]
    attention_mask: list[list[int]] | None
    sampling: dict[str, Any]
    capacity: int
    start: int = 0
    done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """One forward for a caller that samples itself; logits of the last `keep` positions come back."""

    session: int
    attempt: int
    epoch: int
    batch: int
    new_tokens: int
    position: int
    keep: int
    capacity: int
    ids: bytes
    attention_mask: bytes | None
    position_ids: bytes | None
    reorder: list[int] | None


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


def error_to_plain(error: BaseException) -> dict[str, str]:
    """An error as a reply; the caller raises the same type."""
    plain = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, InputError):
        plain |= {
            "what": error.what,
            "expected": error.expected,
            "actual": error.actual,
            "remedy": error.remedy,
        }
    return plain


def error_from_plain(plain: Mapping[str, str], device: str) -> Exception:
    """The error that a device reported."""
    kind = _ERRORS.get(plain["type"])
    if kind is not None:
        fields = {k: plain[k] for k in ("expected", "actual", "remedy")}
        return kind(f"{device}: {plain['what']}", **fields)
    if plain["type"] == "DeviceLost":
        return DeviceLost(f"{device}: {plain['message']}")
    return RuntimeError(f"{device} failed: {plain['type']}: {plain['message']}")


def _ranges(values: Any) -> tuple[Range, ...]:
    return tuple(Range(*v) for v in values)


def _spec(plain: Mapping[str, Any]) -> ShardSpec:
    layers = tuple(
        LayerShare(**{**x, "groups": _ranges(x["groups"]), "columns": _ranges(x["columns"])}) for x in plain["layers"]
    )
    return ShardSpec(layers=layers, embedding=plain["embedding"], vocab_rows=_ranges(plain["vocab_rows"]))


def _route(plain: Mapping[str, Any]) -> Route:
    blocks = tuple(SubBlock(**{**b, "devices": tuple(b["devices"])}) for b in plain["sub_blocks"])
    boundaries = tuple(
        Boundary(b["after"], tuple(Message(**m) for m in b["messages"]), b["inner"]) for b in plain["boundaries"]
    )
    channel = None if plain["channel"] is None else NoisyChannel.from_plain(plain["channel"])
    return Route(blocks, boundaries, plain["origin"], plain["greedy"], plain["codec"], channel)
