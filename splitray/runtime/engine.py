"""The engine: one model spread over a fleet of devices, and the runs that it starts on them.

It awaits one value a token; between tokens the devices talk to each other. It decides no placement.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgpack
import torch
from torch import Tensor

from splitray.arch import ModelArch
from splitray.codecs import Codec
from splitray.errors import DeviceLost, InputError, ModelError
from splitray.model.layout import LayerLayout
from splitray.placement import Placement, validate
from splitray.route import Route, compile_route
from splitray.runtime.crossing import tensor_of
from splitray.runtime.fleet import Fleet
from splitray.runtime.listener import dial
from splitray.runtime.messages import DecodeOrder, LoadOrder, StepOrder, error_from_plain, shard_spec
from splitray.runtime.sampling import Sampling
from splitray.runtime.shard_host import CALLER, DEADLINE_S
from splitray.runtime.wire import Channel, Endpoint, Frame, Kind
from splitray.topology import DeviceId, Topology

Runtime = Literal["local", "process", "ray"]
_TICK_S = 0.2  # how often a waiting caller looks whether a device has died


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What one run cost. Bytes and messages are of its decode steps, over all devices, per step."""

    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    messages_per_token: float
    bytes_per_token: float
    wire_bytes_per_token: float
    driver_bytes_per_token: float
    decode_cpu_s: float
    kv_bytes: dict[str, int]


class Engine:
    """A model running over a fleet. One run at a time; safe to share between threads."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        model_path: str | Path,
        arch: ModelArch,
        layout: LayerLayout,
        topology: Topology,
        placement: Placement,
        tokenizer: Any = None,
        lean: bool = True,
        spin_s: float = 0.0,
        pin: bool = False,
        codec: Codec = "none",
    ) -> None:
        """Start the fleet and load the shards.

        `spin_s` is how long a receive polls before it sleeps; `pin` gives each device a core of its own. Both are
        for devices on one machine with at least as many cores, where the scheduler may put two on one core. `codec` is
        how partials and states travel (codecs.py): exactly unless it says otherwise.

        Raises:
            InputError: the placement, the topology or the model cannot be used as asked.
            DeviceLost: a device did not come up.
        """
        validate(placement, arch, topology)
        self.arch, self.layout, self.topology, self.placement = arch, layout, topology, placement
        self.route: Route = compile_route(placement, arch, topology, codec=codec)
        self.tokenizer, self.model_path, self.fleet = tokenizer, str(model_path), fleet
        self.epoch = 0
        self.report: RunReport | None = None
        self.lost: str | None = None
        self.load_stats: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._attempt = 0
        self._channels: dict[str, Channel] = {}
        try:
            self._start(lean, spin_s, pin)
        except BaseException:
            self.close()
            raise

    def _start(self, lean: bool, spin_s: float, pin: bool) -> None:
        devices = [self.topology.device(d) for d in self.topology.ids if d in self.route.devices]
        endpoints = self.fleet.start(devices)
        for device in devices:
            self._channels[device.id] = dial(
                endpoints[device.id], me=CALLER, peer=device.id, token=self.fleet.token, deadline_s=DEADLINE_S
            )
        head_rows = {str(d): ranges for d, ranges in self.placement.head.by_device}
        cores = sorted(os.sched_getaffinity(0)) if pin else []
        for i, device in enumerate(devices):
            order = LoadOrder(
                model_path=device.model_path or self.model_path,
                arch=self.arch,
                layout=self.layout,
                spec=shard_spec(self.placement, self.arch, self.route, self.topology.ids, device.id),
                route=self.route,
                head_rows=head_rows,
                torch_device=device.torch_device,
                lean=lean,
                core=cores[i % len(cores)] if cores else None,
            )
            self._order(device.id, "load", order.to_plain())
        self.load_stats = self._replies()
        prints = {d: s["fingerprint"] for d, s in self.load_stats.items()}
        if len(set(prints.values())) > 1:
            raise ModelError(
                "weights of the devices",
                expected="the same checkpoint on every device",
                actual=prints,
                remedy="copy one checkpoint to every model_path",
            )
        dials = self._dials(endpoints)
        for device in devices:
            mine = {b: list(_plain(endpoints[b])) for a, b in dials if a == device.id}
            waits = [a for a, b in dials if b == device.id]
            self._order(device.id, "connect", {"dial": mine, "await": waits, "spin_s": spin_s})
        self._replies()

    def _dials(self, endpoints: dict[str, Endpoint]) -> list[tuple[str, str]]:
        """(who opens, to whom) for every pair that exchanges: the edge side opens, it may sit behind NAT."""
        order = self.topology.ids
        pairs = {frozenset((m.source, m.target)) for b in self.route.boundaries for m in b.messages}

        def rank(device: DeviceId) -> tuple[bool, int]:
            return self.topology.device(device).tier == "cloud", order.index(device)

        return [(a, b) for a, b in (sorted(pair, key=rank) for pair in sorted(pairs, key=sorted))]

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Generate for one prompt; yields new ids as they come, a stop id included. Closing it cancels the run.

        Raises:
            InputError: an empty prompt, ids outside the vocabulary, or more tokens than the context holds.
            DeviceLost: a device died or missed its deadline.
        """
        self.check_prompt(prompt_ids, sampling.max_new_tokens)
        for ids in self.stream_batch([list(prompt_ids)], sampling):
            yield ids[0]

    def check_prompt(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that cannot run."""
        if not prompt_ids:
            raise InputError("prompt", expected="at least one token", actual="none", remedy="write a prompt")
        wrong = [i for i in prompt_ids if not 0 <= i < self.arch.vocab]
        if wrong:
            raise InputError(
                "prompt ids",
                expected=f"ids in [0, {self.arch.vocab})",
                actual=wrong[:5],
                remedy="use this model's tokenizer",
            )
        if len(prompt_ids) + max_new_tokens > self.arch.context_tokens:
            raise InputError(
                "prompt",
                expected=f"prompt and new tokens within the context of {self.arch.context_tokens} tokens",
                actual=f"{len(prompt_ids)} + {max_new_tokens}",
                remedy="shorten the prompt or ask for fewer new tokens",
            )

    def stream_batch(
        self, prompts: list[list[int]], sampling: Sampling, *, attention_mask: list[list[int]] | None = None
    ) -> Iterator[list[int]]:
        """Generate for a batch of equally long prompts (left-padded, with a mask, if they are not)."""
        with self._lock:
            self._usable()
            self._attempt += 1
            order = DecodeOrder(
                session=self._attempt,
                attempt=self._attempt,
                epoch=self.epoch,
                prompt=prompts,
                attention_mask=attention_mask,
                sampling=asdict(sampling),
                capacity=len(prompts[0]) + sampling.max_new_tokens,
            )
            started = time.perf_counter()
            for device in self._channels:
                self._order(device, "decode", asdict(order))
            arrivals: list[float] = []
            replies: dict[str, dict[str, Any]] = {}
            finished = False
            try:
                while len(replies) < len(self._channels):
                    device, frame = self._next_frame(set(self._channels) - set(replies))
                    if frame.kind == Kind.TOKEN:
                        if frame.attempt == self._attempt:
                            arrivals.append(time.perf_counter())
                            yield tensor_of(frame).tolist()
                    else:
                        replies[device] = self._reply(device, frame)
                finished = True
            finally:
                if not finished and self.lost is None:
                    self._cancel(set(self._channels) - set(replies))
            self.report = _report(replies, started, arrivals, len(prompts))

    def _cancel(self, open_devices: set[str]) -> None:
        header = (int(Kind.CANCEL), 0, self.epoch, 0, 0, self._attempt, "", ())
        self._channels[self.route.sampler].send(header)
        while open_devices:
            device, frame = self._next_frame(open_devices)
            if frame.kind == Kind.REPLY:
                with contextlib.suppress(DeviceLost):
                    self._reply(device, frame)
                open_devices.discard(device)

    def step(
        self,
        *,
        session: int,
        ids_BT: Tensor,
        position: int,
        keep: int,
        capacity: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reorder: Tensor | None = None,
    ) -> Tensor:
        """One forward for a caller that samples itself (runtime/hf.py).

        Returns:
            Float32 logits [batch, keep, vocab], joined from all holders of the head.
        """
        with self._lock:
            self._usable()
            self._attempt += 1
            batch, new_tokens = ids_BT.shape
            order = StepOrder(
                session=session,
                attempt=self._attempt,
                epoch=self.epoch,
                batch=batch,
                new_tokens=new_tokens,
                position=position,
                keep=keep,
                capacity=capacity,
                ids=_bytes(ids_BT),
                attention_mask=None if attention_mask is None else _bytes(attention_mask),
                position_ids=None if position_ids is None else _bytes(position_ids.expand(batch, -1)),
                reorder=None if reorder is None else reorder.tolist(),
            )
            plain = msgpack.packb({"op": "step", **asdict(order)})
            for device in self._channels:
                self._channels[device].send((int(Kind.CALL), 0, 0, 0, 0, 0, "", ()), plain)
                self._channels[device].drain_fully()
            holders = self.placement.head.by_device
            waiting = {str(d) for d, _ in holders}
            parts: dict[str, Tensor] = {}
            while waiting:
                device, frame = self._next_frame(set(self._channels))
                if frame.dtype != "float32":
                    self._reply(device, frame)  # raises the device's error
                parts[device] = tensor_of(frame)
                waiting.discard(device)
            if len(parts) == 1:
                return next(iter(parts.values()))
            first = next(iter(parts.values()))
            logits = first.new_empty((*first.shape[:2], self.arch.vocab))
            for device_id, ranges in holders:
                at = 0
                for r in ranges:
                    logits[..., r.start : r.stop] = parts[device_id][..., at : at + r.count]
                    at += r.count
            return logits

    def forget(self, session: int) -> None:
        """Free a session's KV on every device."""
        with self._lock:
            if self.lost is None and self._channels:
                self._ask("forget", {"session": session})

    def stats(self) -> dict[str, dict[str, Any]]:
        """Memory, bytes and CPU seconds of every device."""
        with self._lock:
            self._usable()
            return self._ask("stats", {})

    def echo(self, a: str, b: str, *, size: int, rounds: int) -> list[float]:
        """Round trips in seconds of frames of `size` bytes between two devices, through the wire code."""
        times: list[float] = self._echo(a, b, size=size, rounds=rounds, cold_bytes=0)[a]["round_trip_s"]
        return times

    def hops(self, a: str, b: str, *, size: int, rounds: int, cold_bytes: int) -> list[float]:
        """One-way times of such frames where each side reads weights, and the other one sleeps, in between."""
        told = self._echo(a, b, size=size, rounds=rounds, cold_bytes=cold_bytes)
        return [
            (there_and_back - worked) / 2
            for there_and_back, worked in zip(told[a]["round_trip_s"], told[b]["worked_s"], strict=True)
        ]

    def _echo(self, a: str, b: str, **order: int) -> dict[str, dict[str, Any]]:
        with self._lock:
            self._usable()
            self._order(a, "echo", {"peer": b, "first": True, **order})
            self._order(b, "echo", {"peer": a, "first": False, **order})
            return self._replies({a, b})

    def speeds(self, device: str, *, cold_bytes: int) -> dict[str, float]:
        """How fast a device multiplies and copies while the others sleep; see runtime/speed.py."""
        with self._lock:
            self._usable()
            self._order(device, "speeds", {"cold_bytes": cold_bytes})
            rates: dict[str, float] = self._replies({device})[device]
            return rates

    def close(self) -> None:
        """Stop every device. Idempotent."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.lost = self.lost or "the engine is closed"
        self.fleet.close()

    def __enter__(self) -> Self:
        """Use the engine as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _usable(self) -> None:
        if self.lost is not None:
            raise DeviceLost(f"this engine cannot run any more: {self.lost}")

    def _order(self, device: str, op: str, order: dict[str, Any]) -> None:
        channel = self._channels[device]
        channel.send((int(Kind.CALL), 0, 0, 0, 0, 0, "", ()), msgpack.packb({"op": op, **order}))
        channel.drain_fully()

    def _ask(self, op: str, order: dict[str, Any]) -> dict[str, dict[str, Any]]:
        for device in self._channels:
            self._order(device, op, order)
        return self._replies()

    def _replies(self, devices: set[str] | None = None) -> dict[str, dict[str, Any]]:
        waiting = set(self._channels) if devices is None else set(devices)
        replies = {}
        while waiting:
            device, frame = self._next_frame(waiting)
            if frame.kind == Kind.REPLY:
                replies[device] = self._reply(device, frame)
                waiting.discard(device)
        return replies

    def _reply(self, device: str, frame: Frame) -> dict[str, Any]:
        values: dict[str, Any] = msgpack.unpackb(bytes(frame.payload), strict_map_key=False)
        if "error" in values:
            error = error_from_plain(values["error"], device)
            if not isinstance(error, InputError):
                self.lost = str(error)
            raise error
        return values

    def _next_frame(self, devices: set[str]) -> tuple[str, Frame]:
        """The next frame of any of the devices; looks for dead ones while it waits."""
        try:
            while True:
                by_fd = {}
                poll = select.poll()
                for device in devices:
                    channel = self._channels[device]
                    channel.take_in()
                    if channel.pending:
                        return device, channel.pending.popleft()
                    by_fd[channel.sock.fileno()] = device
                    poll.register(channel.sock.fileno(), select.POLLIN)
                if not poll.poll(_TICK_S * 1000):
                    dead = self.fleet.dead()
                    if dead:
                        raise DeviceLost("; ".join(f"{d}: {why}" for d, why in dead.items()))
        except DeviceLost as error:
            dead = self.fleet.dead()
            self.lost = "; ".join(f"{d}: {why}" for d, why in dead.items()) or str(error)
            raise DeviceLost(self.lost) from error


def _plain(endpoint: Endpoint) -> tuple[str, str, int]:
    return endpoint.unix, endpoint.host, endpoint.port


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(torch.int64).contiguous().numpy().tobytes()


def _report(replies: dict[str, dict[str, Any]], started: float, arrivals: list[float], batch: int) -> RunReport:
    steps = max((r["steps"] for r in replies.values()), default=0)
    each = max(steps, 1)

    def total(key: str) -> float:
        return sum(r[key] for r in replies.values()) / each

    spread = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else None
    return RunReport(
        new_tokens=len(arrivals),
        ttft_s=arrivals[0] - started if arrivals else 0.0,
        tpot_s=None if spread is None else spread / (len(arrivals) - 1),
        messages_per_token=total("messages"),
        bytes_per_token=total("payload_bytes"),
        wire_bytes_per_token=total("wire_bytes"),
        driver_bytes_per_token=4.0 * batch,
        decode_cpu_s=sum(r["decode_cpu_s"] for r in replies.values()),
        kv_bytes={d: r["kv_bytes"] for d, r in replies.items()},
    )
