"""What a step of a placement costs: time, energy and memory, from the same Route that the engine executes.

A placement becomes a `Load` (bytes, operations and messages, no seconds), a topology becomes `Rates`, and `step_cost`
runs one clock a device over the route. All three carry a leading axis N, so that a simulator prices many instances at
once; a single placement has N = 1. FLOPs count a multiply-add as two. Equation numbers are those of docs/equations.md.

Shapes: N instances, B stages (sub-blocks in order, an inner boundary a stage of its own), D devices. A matrix
[.., D, D] is indexed [source, target].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitray.arch import ModelArch
from splitray.codecs import Codec
from splitray.placement import Placement, weight_bytes
from splitray.route import Message, Route, SubBlock, compile_route, message_bytes
from splitray.topology import Device, DeviceId, Topology

Floats = NDArray[np.float64]
TimeModel = Literal["roofline", "flops"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What placements make each device do and send in one step: work, not seconds.

    `weight_bytes` are read once a step; `flops` are for each new token of each sequence; `kv_bytes` and
    `attention_flops` are for each token of context (the latter for each new token too); `launches` counts sub-blocks
    that a device takes part in. The head works for one token of each sequence, and so it is kept apart.
    """

    devices: tuple[DeviceId, ...]
    origin: int
    weight_bytes: Floats  # [N, B, D]
    flops: Floats  # [N, B, D]
    kv_bytes: Floats  # [N, B, D]
    attention_flops: Floats  # [N, B, D]
    launches: Floats  # [N, B, D]
    head_flops: Floats  # [N, D]
    sends: NDArray[np.bool_]  # [N, B, D, D]
    position_bytes: Floats  # [N, B, D, D]
    sequence_bytes: Floats  # [N, B, D, D]
    embeds: NDArray[np.bool_]  # [N, D]

    @property
    def num_instances(self) -> int:
        """N, the number of placements or instances side by side."""
        return len(self.weight_bytes)

    def take(self, rows: Any) -> Load:
        """The instances that a numpy index of the first axis selects."""
        taken: dict[str, Any] = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return replace(self, **taken)

    def put(self, rows: Any, load: Load) -> None:
        """Give the instances that a numpy index of the first axis selects other loads, in place."""
        for name in _ARRAYS:
            getattr(self, name)[rows] = getattr(load, name)

    @staticmethod
    def stack(loads: Sequence[Load]) -> Load:
        """Loads of one arch and topology side by side."""
        joined: dict[str, Any] = {n: np.concatenate([getattr(x, n) for x in loads]) for n in _ARRAYS}
        return replace(loads[0], **joined)


_ARRAYS = (
    "weight_bytes", "flops", "kv_bytes", "attention_flops", "launches", "head_flops", "sends", "position_bytes",
    "sequence_bytes", "embeds",
)  # fmt: skip


def load_of(
    placement: Placement, arch: ModelArch, topology: Topology, *, greedy: bool = True, codec: Codec = "none"
) -> Load:
    """The load of one placement (N = 1); coding and decoding count as no work.

    Raises:
        TopologyError: two devices that must exchange have no link.
    """
    return load_of_route(
        compile_route(placement, arch, topology, greedy=greedy, codec=codec), placement, arch, topology
    )


def load_of_route(route: Route, placement: Placement, arch: ModelArch, topology: Topology) -> Load:
    """The load of a placement whose route is compiled already (N = 1)."""
    index = {d: i for i, d in enumerate(topology.ids)}
    inner = arch.qk_norm_over_heads
    stages: list[tuple[SubBlock, bool]] = []
    for block in route.sub_blocks:
        if inner and block.kind == "attention":
            stages.append((block, True))
        stages.append((block, False))
    num_stages, num_devices = len(stages) + 1, len(index)
    work = {n: np.zeros((num_stages, num_devices)) for n in _ARRAYS[:5]}
    head_flops = np.zeros(num_devices)
    sends = np.zeros((num_stages, num_devices, num_devices), bool)
    position, sequence = np.zeros(sends.shape), np.zeros(sends.shape)

    def put(stage: int, messages: Sequence[Message], into_head: bool) -> None:
        for m in messages:
            at = stage, index[m.source], index[m.target]
            sends[at] = True
            once = into_head or m.content in ("best", "logits", "token")
            (sequence if once else position)[at] += message_bytes(m, arch, codec=route.codec)

    head = route.sub_blocks[-1]
    for stage, (block, is_inner) in enumerate(stages):
        if is_inner:
            put(stage, route.boundary(block.index, inner=True).messages, into_head=False)
            continue
        put(stage, route.boundary(block.index).messages, into_head=block.index == head.index - 1)
        for device in block.devices:
            d = index[device]
            work["launches"][stage, d] = block.kind != "embedding"
            groups, units, rows = _held(block, placement, device)
            work["kv_bytes"][stage, d] = groups * arch.kv_bytes_per_token
            work["attention_flops"][stage, d] = 4 * groups * arch.heads_per_group * arch.head_dim
            params = groups * arch.group_params + units * arch.ffn_unit_params
            work["flops"][stage, d] = 2 * params
            held = arch.on(device)
            work["weight_bytes"][stage, d] = held.weight_bytes(params) + held.table_bytes(rows * arch.vocab_row_params)
            head_flops[d] += 2 * rows * arch.vocab_row_params
    put(num_stages - 1, route.boundary(head.index + 1).messages, into_head=False)
    embeds = np.isin(np.array(topology.ids), placement.embedding)
    return Load(
        devices=topology.ids, origin=index[route.origin], head_flops=head_flops[None], sends=sends[None],
        position_bytes=position[None], sequence_bytes=sequence[None], embeds=embeds[None],
        **{n: a[None] for n, a in work.items()},
    )  # fmt: skip


def _held(block: SubBlock, placement: Placement, device: DeviceId) -> tuple[int, int, int]:
    """KV groups, FFN units and head rows that a device works on in a sub-block."""
    match block.kind:
        case "embedding":
            return 0, 0, 0  # a row lookup
        case "head":
            return 0, 0, placement.head.count(device)
        case "attention":
            return placement.layers[block.layer].attention.count(device), 0, 0
        case "ffn":
            return 0, placement.layers[block.layer].ffn.count(device), 0
        case "layer":
            layer = placement.layers[block.layer]
            return layer.attention.count(device), layer.ffn.count(device), 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast devices and links are, for N instances or for one (N = 1, broadcast).

    `latency_s` is half the round trip; `exchange_s` is the fixed cost of a message, which a device's messages pay one
    after the other; a pair without a link has rate 0.
    `medium` numbers the shared media, -1 where a link shares nothing but its ends' interfaces.
    `contention_s_per_byte` is what the first device takes longer for each byte that the second one reads at the same
    time, because both read one memory; 0 where they do not.
    """

    flops_per_s: Floats  # [N, D]
    bytes_per_s: Floats  # [N, D]
    launch_s: Floats  # [N, D]
    link_bytes_per_s: Floats  # [N, D, D]
    latency_s: Floats  # [N, D, D]
    exchange_s: Floats  # [N, D, D]
    contention_s_per_byte: Floats  # [N, D, D]
    medium: NDArray[np.int64]  # [D, D]

    @cached_property
    def shares_media(self) -> bool:
        """Whether any link is part of a shared medium."""
        return bool((self.medium >= 0).any())

    @cached_property
    def shares_memory(self) -> bool:
        """Whether any device is slowed down by another one's reading."""
        return bool(self.contention_s_per_byte.any())

    def take(self, rows: Any) -> Rates:
        """The instances that a numpy index of the first axis selects."""
        names = [f.name for f in fields(self) if f.name != "medium"]
        return replace(self, **{n: getattr(self, n)[rows] for n in names})

    @staticmethod
    def stack(rates: Sequence[Rates]) -> Rates:
        """Rates of one topology's devices and links side by side."""
        names = [f.name for f in fields(Rates) if f.name != "medium"]
        return replace(rates[0], **{n: np.concatenate([getattr(r, n) for r in rates]) for n in names})

    @cached_property
    def groups(self) -> tuple[tuple[tuple[int, Any], ...], ...]:
        """Each device's targets by the medium that leads to them, -1 for its own uplink."""
        everyone = slice(None)
        return tuple(
            tuple((int(g), everyone if (row == g).all() else np.flatnonzero(row == g)) for g in np.unique(row))
            for row in self.medium
        )

    @staticmethod
    def alone(devices: Sequence[Device]) -> dict[str, Floats]:
        """What the rates say of single devices, [1, D] each."""
        return {
            "flops_per_s": np.array([[d.compute_flops * d.compute_efficiency for d in devices]]),
            "bytes_per_s": np.array([[d.memory_bandwidth_bytes_per_s * d.memory_efficiency for d in devices]]),
            "launch_s": np.array([[d.launch_s for d in devices]]),
        }

    @staticmethod
    def of(topology: Topology, arch: ModelArch | None = None) -> Rates:
        """The rates of a topology, its devices' efficiencies included (N = 1), with a model's weights or plain ones."""
        index = topology.index
        devices = topology.devices if arch is None else holding(topology.devices, arch)
        rate, latency, exchange = (np.zeros((len(index), len(index))) for _ in range(3))
        medium = np.full(rate.shape, -1)
        names = sorted({x.medium for x in topology.links if x.medium is not None})
        for link in topology.links:
            at = index[link.source], index[link.target]
            rate[at], latency[at], exchange[at] = link.bandwidth_bytes_per_s, link.rtt_s / 2, link.exchange_s
            medium[at] = -1 if link.medium is None else names.index(link.medium)
        return Rates(
            **Rates.alone(devices),
            link_bytes_per_s=rate[None],
            latency_s=latency[None],
            exchange_s=exchange[None],
            contention_s_per_byte=_contention(devices)[None],
            medium=medium,
        )


def holding(devices: Sequence[Device], arch: ModelArch) -> tuple[Device, ...]:
    """Devices as fast as they are with the weights of a model in the format in which they hold it."""
    return tuple(d.holding(arch.on(d.id).weights) for d in devices)


def _contention(devices: Sequence[Device]) -> Floats:
    """With k readers a byte takes each of them 1 / own + (k - 1) (1 / shared - 1 / own), which is linear in k."""
    more = np.zeros((len(devices), len(devices)))
    for i, a in enumerate(devices):
        if a.shared_bandwidth_bytes_per_s is None:
            continue
        own = a.memory_bandwidth_bytes_per_s * a.memory_efficiency
        others = [b is not a and b.memory_group == a.memory_group for b in devices]
        more[i, others] = 1 / a.shared_bandwidth_bytes_per_s - 1 / own
    return more


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step of N instances.

    `cycle_s`: from the token at the embedding to the next token at the embedding, which is tpot_s while decoding;
    `origin_s`: until the origin has the next token. A step that never ends (rate 0) takes infinitely long.
    """

    cycle_s: Floats  # [N]
    origin_s: Floats  # [N]
    busy_s: Floats  # [N, D] computing
    radio_s: Floats  # [N, D] sending and receiving
    sent_bytes: Floats  # [N, D, D], of the devices of the load

    def over(self, topology: Topology, taking_part: tuple[DeviceId, ...]) -> StepCost:
        """A step of the devices that take part as one of all devices of a topology: the others do nothing."""
        if taking_part == topology.ids:
            return self
        at = [topology.index[d] for d in taking_part]
        busy_s, radio_s = (np.zeros((len(self.cycle_s), len(topology.ids))) for _ in range(2))
        busy_s[:, at], radio_s[:, at] = self.busy_s, self.radio_s
        return replace(self, busy_s=busy_s, radio_s=radio_s)

    def energy_j(self, topology: Topology, seconds: Floats | None = None) -> Floats:
        """Energy of each device over `seconds` (default the cycle): idle, active and radio parts (E1.17), [N, D]."""
        idle, active, radio = (np.array([getattr(d, n) for d in topology.devices]) for n in _POWERS)
        period = self.cycle_s if seconds is None else seconds
        return idle * period[:, None] + (active - idle) * self.busy_s + radio * self.radio_s


_POWERS = ("idle_w", "active_w", "radio_w")


def step_cost(
    load: Load,
    rates: Rates,
    *,
    context_tokens: float | Floats,
    new_tokens: float | Floats = 1.0,
    batch: float | Floats = 1.0,
    time_model: TimeModel = "roofline",
) -> StepCost:
    """Run the route once: each device has a clock, a receiver waits for its latest message (ARCHITECTURE.md).

    Sends of one device share its uplink, receipts its downlink, and messages of one medium the medium: each group is
    serialised in device order.

    Args:
        load: what is to be done.
        rates: how fast it is done; N as in `load`, or 1.
        context_tokens: tokens in the KV cache of each sequence, the new ones included; a number or [N].
        new_tokens: positions of this step, 1 while decoding; a number or [N].
        batch: sequences of this step; a number or [N].
        time_model: `flops` ignores memory bandwidth, as arXiv 2505.02533; real devices follow the roofline (E1.14).
    """
    n, (num_stages, num_devices) = load.num_instances, load.flops.shape[1:]
    work = work_s(load, rates, context_tokens=context_tokens, new_tokens=new_tokens, batch=batch, time_model=time_model)
    tokens = _column(np.asarray(new_tokens) * np.asarray(batch), 4)
    payload = load.position_bytes * tokens + load.sequence_bytes * _column(batch, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        on_air = np.where(load.sends, payload / rates.link_bytes_per_s[:, None], 0.0)
    transfer = on_air + load.sends * rates.exchange_s[:, None]
    active: NDArray[np.bool_] = np.any(load.sends, axis=(0, 3))  # [B, D]: whoever sends in any instance
    clock = np.zeros((n, num_devices))
    for stage in range(num_stages):
        clock = clock + work[:, stage]
        if active[stage].any():
            clock = exchange(clock, load.sends[:, stage], transfer[:, stage], rates, active[stage])
    sent = on_air.sum(1)
    return StepCost(
        cycle_s=np.where(load.embeds, clock, -np.inf).max(1),
        origin_s=clock[:, load.origin],
        busy_s=work.sum(1),
        radio_s=sent.sum(2) + sent.sum(1),
        sent_bytes=(payload * load.sends).sum(1),
    )


def exchange(
    finish: Floats, sends: NDArray[np.bool_], transfer_s: Floats, rates: Rates, active: NDArray[np.bool_] | None = None
) -> Floats:
    """When each device has what one boundary brings it, [N, D]: maximum and plus alone, so it is linear in those.

    Args:
        finish: when each device has done its part, [N, D].
        sends: who sends to whom, [N, D, D].
        transfer_s: what each message occupies its sender's uplink, its receiver's downlink and a medium, [N, D, D].
        rates: for latency and media.
        active: who sends in any instance, [D], if that is known.
    """
    if finish.shape[1] == 2 and not rates.shares_media:  # nothing to serialise: at most one message each way
        came = np.where(sends, finish[:, :, None] + transfer_s + rates.latency_s, -np.inf)
        met: Floats = np.maximum(finish, came.max(1))
        return met
    arrival, free = finish.copy(), np.full(finish.shape, -np.inf)
    medium_free: dict[int, Floats] = {}
    senders = sends.any((0, 2)) if active is None else active
    for s in map(int, np.flatnonzero(senders)):
        for group, targets in rates.groups[s]:
            begin, busy = finish[:, s], transfer_s[:, s, targets]
            mine = sends[:, s, targets]
            if group >= 0:
                begin = np.maximum(begin, medium_free.get(group, begin))
            end = begin[:, None] + np.cumsum(busy, axis=1)
            if group >= 0:  # taken only where this device sends: instances differ
                before = medium_free.get(group, np.full(len(begin), -np.inf))
                medium_free[group] = np.where(mine.any(1), end[:, -1], before)
            earlier = free[:, targets]  # -inf: nothing came there yet, and -inf plus an outage's inf is no time
            end = np.maximum(
                end, np.where(np.isfinite(earlier), earlier, 0.0) + np.where(earlier > -np.inf, busy, -np.inf)
            )
            free[:, targets] = np.where(mine, end, free[:, targets])
            came = np.where(mine, end + rates.latency_s[:, s, targets], -np.inf)
            arrival[:, targets] = np.maximum(arrival[:, targets], came)
    return arrival


def work_s(
    load: Load,
    rates: Rates,
    *,
    context_tokens: float | Floats,
    new_tokens: float | Floats = 1.0,
    batch: float | Floats = 1.0,
    time_model: TimeModel = "roofline",
) -> Floats:
    """Computing time of every stage on every device, [N, B, D]: E1.14, or FLOPs over FLOP/s.

    Devices that share a memory begin a stage together: the one with less to read slows the others down until it is
    done, which costs each of them the smaller one's bytes times the contention.
    """
    context, new, many = _column(context_tokens, 3), _column(new_tokens, 3), _column(batch, 3)
    flops = (load.flops + load.attention_flops * context) * new * many
    flops[:, -2] += load.head_flops * many[:, 0]
    seconds: Floats = flops / rates.flops_per_s[:, None]
    if time_model == "flops":
        return seconds
    num_bytes = load.weight_bytes + load.kv_bytes * context * many
    read = num_bytes / rates.bytes_per_s[:, None]
    if rates.shares_memory:
        both = np.minimum(num_bytes[..., None], num_bytes[..., None, :])
        read = read + (both * rates.contention_s_per_byte[:, None]).sum(-1)
    total: Floats = np.maximum(seconds, read) + load.launches * rates.launch_s[:, None]
    return total


def _column(value: float | Floats, ndim: int) -> Floats:
    """A number or [N] as [N or 1, 1, ...], to broadcast over instances."""
    array = np.atleast_1d(np.asarray(value, float))
    return array.reshape(-1, *([1] * (ndim - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a placement will cost, as `splitray plan` reports it. Energy and memory are sums over what devices do."""

    ttft_s: float
    tpot_s: float
    energy_j_per_token: float
    memory_bytes: Mapping[DeviceId, int]


class CostModel:
    """Prices placements of one model on one topology."""

    def __init__(
        self, arch: ModelArch, topology: Topology, *, time_model: TimeModel = "roofline", codec: Codec = "none"
    ) -> None:
        """A model of one decoder on one topology, for any number of placements."""
        self.arch, self.topology, self.time_model, self.codec = arch, topology, time_model, codec

    @cached_property
    def rates(self) -> Rates:
        """The topology's rates (N = 1)."""
        return Rates.of(self.topology, self.arch)

    def decode(self, placement: Placement, *, context_tokens: float, batch: int = 1) -> StepCost:
        """One decode step with `context_tokens` cached tokens, the new one included."""
        load, rates = self._taking_part(placement)
        step = step_cost(load, rates, context_tokens=context_tokens, batch=batch, time_model=self.time_model)
        return step.over(self.topology, load.devices)

    def tpot_s(self, placement: Placement, *, context_tokens: float) -> float:
        """Predicted time of one decode step in seconds."""
        return float(self.decode(placement, context_tokens=context_tokens).cycle_s[0])

    def ttft_s(self, placement: Placement, *, prompt_tokens: int) -> float:
        """Predicted time from the prompt at the origin to the first token there, in seconds."""
        load, rates = self._taking_part(placement)
        step = step_cost(
            load, rates, context_tokens=prompt_tokens, new_tokens=prompt_tokens, time_model=self.time_model
        )
        return float(prompt_s(load, rates, prompt_tokens)[0] + step.origin_s[0])

    def _taking_part(self, placement: Placement) -> tuple[Load, Rates]:
        """Load and rates of the origin and the holders alone: the tables of all pairs of many devices are large."""
        where = self.topology.among({self.topology.origin, *placement.devices})
        load = load_of(placement, self.arch, where, codec=self.codec)
        return load, self.rates if where is self.topology else Rates.of(where, self.arch)

    def predict(self, placement: Placement, *, prompt_tokens: int, context_tokens: int) -> Prediction:
        """Everything at once; memory holds weights and the KV of `context_tokens` tokens."""
        step = self.decode(placement, context_tokens=max(1, context_tokens))
        return Prediction(
            ttft_s=self.ttft_s(placement, prompt_tokens=max(1, prompt_tokens)),
            tpot_s=float(step.cycle_s[0]),
            energy_j_per_token=float(step.energy_j(self.topology).sum()),
            memory_bytes=memory_bytes(placement, self.arch, context_tokens),
        )


def prompt_s(load: Load, rates: Rates, prompt_tokens: float | Floats) -> Floats:
    """Time for the prompt's ids (4 bytes each) from the origin to the last embedding holder, [N]."""
    there = np.arange(len(load.devices)) == load.origin
    with np.errstate(divide="ignore", invalid="ignore"):
        way = _column(prompt_tokens, 2) * 4 / rates.link_bytes_per_s[:, load.origin]
        way = way + rates.latency_s[:, load.origin] + rates.exchange_s[:, load.origin]
    needed: Floats = np.where(load.embeds & ~there, way, 0.0).max(1)
    return needed


def memory_bytes(placement: Placement, arch: ModelArch, context_tokens: int) -> dict[DeviceId, int]:
    """Weights and KV of `context_tokens` tokens on each device of the placement (E1.8 to E1.12).

    Pass the context at the end of a planning interval, so that growth within it cannot overflow.
    """
    needed = weight_bytes(placement, arch)
    for layer in placement.layers:
        for device in layer.attention.devices:
            needed[device] += layer.attention.count(device) * arch.kv_bytes_per_token * context_tokens
    return needed
