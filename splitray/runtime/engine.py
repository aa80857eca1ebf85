"""The engine: one model spread over a fleet of devices, and the runs that it starts on them.

It awaits one value a token; between tokens the devices talk to each other. It decides no placement.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

import msgpack
import torch
from torch import Tensor

from splitray.arch import ModelArch
from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import DeviceLost, InputError
from splitray.model.layout import LayerLayout
from splitray.placement import Placement, validate
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.route import Route
from splitray.runtime.asking import ask
from splitray.runtime.crossing import tensor_of
from splitray.runtime.epoch import Epoch, Kept, Next, astuple, stage_orders, switch_orders, the_same_weights
from splitray.runtime.fleet import Fleet
from splitray.runtime.listener import dial
from splitray.runtime.messages import StepOrder, error_from_plain
from splitray.runtime.protection import Protection
from splitray.runtime.recovery import Fault, Recovery, recovered, without
from splitray.runtime.returns import Returns
from splitray.runtime.run_report import Meter, RunReport
from splitray.runtime.sampling import Sampling
from splitray.runtime.session import Session
from splitray.runtime.shard_host import CALLER, DEADLINE_S
from splitray.runtime.wire import Channel, Endpoint, Frame, Kind
from splitray.topology import DeviceId, Topology

Runtime = Literal["local", "process", "ray"]
logger = logging.getLogger(__name__)
_TICK_S = 0.1  # how often a waiting caller looks whether a device has died
_ANSWER_S = 1.0  # a busy device has one thread for its work and another one for us
_LOAD_S = 600.0  # of silence from a device that reads its slices


class Engine:
    """A model running over a fleet. One run at a time; safe to share between threads.

    A run is a row of segments: in each the devices generate among themselves, between two of them the placement may
    change. A migration ends a segment at a token; a fault ends it where it is.
    """

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
        channel: NoisyChannel | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        """Start the fleet and load the shards.

        `spin_s` is how long a receive polls before it sleeps; `pin` gives each device a core of its own. Both are
        for devices on one machine with at least as many cores, where the scheduler may put two on one core. `codec` is
        how partials and states travel (codecs.py): exactly unless it says otherwise; `channel` is what happens to
        them on the way (channel.py): nothing by default. With `recovery` a run survives the loss of devices; without,
        it ends with `DeviceLost`.

        Raises:
            InputError: the placement, the topology or the model cannot be used as asked.
            DeviceLost: a device did not come up.
        """
        validate(placement, arch, topology)
        self.arch, self.layout, self.topology = arch, layout, topology
        self.tokenizer, self.model_path, self.fleet = tokenizer, str(model_path), fleet
        self.recovery = recovery
        self.report: RunReport | None = None
        self.tokens = 0
        """Decode steps of all runs so far."""
        self.lost: str | None = None
        self.load_stats: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.endpoints: dict[str, Endpoint] = {}
        cores = tuple(sorted(os.sched_getaffinity(0))) if pin else ()
        self.now = Epoch.of(
            0, placement, topology, arch=arch, layout=layout, model_path=self.model_path, codec=codec, lean=lean,
            cores=cores, channel=channel,
        )  # fmt: skip
        self._whole = placement, topology
        """What to go back to when all devices are there again."""
        self.next: Next | None = None
        self._known = {d.id: d for d in topology.devices}
        self._returns = Returns(self)
        self.starting = threading.RLock()
        """Held while devices are started, dialled or left out, by a run or beside it."""
        self._spin_s, self._lock = spin_s, threading.Lock()
        self._name = f"{CALLER}/{secrets.token_hex(6)}"
        self._attempt = self.last_epoch = 0
        self.restarted: dict[str, list[float]] = {}
        self.disturbed = False
        """Whether a fault is being seen to."""
        self._channels: dict[str, Channel] = {}
        self._session: Session | None = None
        self._kept: dict[int, Kept] = {}
        """Sessions of callers that sample themselves."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def placement(self) -> Placement:
        """What runs now."""
        return self.now.placement

    @property
    def route(self) -> Route:
        """Compiled from it."""
        return self.now.route

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.now.number

    @property
    def progress(self) -> Session | None:
        """The run that goes on, or None."""
        return self._session

    def _start(self) -> None:
        devices = [self.topology.device(d) for d in self.topology.ids if d in self.route.devices]
        self.endpoints = dict(self.fleet.start(devices))
        for device in devices:
            self.dial(device.id)
        self.load_stats = self.stage(self.now, [])
        self.switch(self.now, [])
        self.make_ready()

    def dial(self, device: str) -> None:
        """Connect to a device, again if need be.

        Raises:
            DeviceLost: it does not answer.
        """
        before = self._channels.pop(device, None)
        if before is not None:
            before.close()
        channel = self._channels[device] = dial(
            self.endpoints[device], me=self._name, peer=device, token=self.fleet.token, deadline_s=DEADLINE_S
        )
        self._order(device, "hello", {})
        channel.read()  # from now on nothing that is staged there is taken for an engine's before

    def stage(
        self, epoch: Epoch, sessions: Sequence[Kept], *, void: frozenset[str] = frozenset()
    ) -> dict[str, dict[str, Any]]:
        """Let every device of an epoch read what it lacks and copy the KV of sessions; what runs goes on.

        Devices in `void` hold nothing of the epoch that runs now.

        Raises:
            ModelError: devices have different weights.
            DeviceLost: a device is gone.
        """
        orders = stage_orders(epoch, self.now, sessions, self.endpoints, void)
        answers = ask(orders, self.endpoints, self.fleet.token, within_s=_LOAD_S)
        the_same_weights(answers)
        return answers

    def switch(self, epoch: Epoch, sessions: Sequence[Kept], *, anew: bool = False) -> dict[str, dict[str, Any]]:
        """Let a staged epoch run from now on. Only between segments.

        `anew` opens all connections between devices again.
        """
        orders = switch_orders(epoch, None if anew or epoch is self.now else self.now, sessions, self.endpoints,
                               spin_s=self._spin_s)  # fmt: skip
        for device, order in orders.items():
            self._order(device, "switch", order)
        answers = self._replies(set(orders))
        self.now = epoch
        return answers

    def migrate(self, placement: Placement, *, topology: Topology | None = None, copies_kv: bool = True) -> Next:
        """Stage another placement in the background; it takes over between two tokens of the run, or now if none runs.

        The KV of the run is copied meanwhile or, without `copies_kv`, computed anew from its tokens at the switch: less
        to send where KV is larger than the states of a prompt, and nothing where the new placement is one device.

        Returns:
            What becomes of it; `done` is set once it runs or has failed.

        Raises:
            InputError: the placement does not fit, or another one is on its way.
        """
        topology = topology or self.topology
        validate(placement, self.arch, topology)
        self._known |= {d.id: d for d in topology.devices}
        if self.next is not None and not self.next.done.is_set():
            raise InputError("migration", expected="one at a time", actual="another one on its way",
                             remedy="wait for it")  # fmt: skip
        self.last_epoch = max(self.last_epoch, self.epoch) + 1
        self.next = Next(self.now.moved(placement, topology, self.last_epoch), copies_kv)
        threading.Thread(target=self._prepare, args=(self.next,), name="splitray-stage", daemon=True).start()
        return self.next

    def _prepare(self, coming: Next) -> None:
        started = time.perf_counter()
        try:
            with self.starting:
                self.ensure(coming.epoch)
            coming.sessions = self._sessions(coming)
            answers = self.stage(coming.epoch, coming.sessions)
            coming.staged_bytes = sum(a["copied_bytes"] for a in answers.values())
            coming.copy_s = max(a["copy_s"] for a in answers.values())
            coming.stage_s = time.perf_counter() - started
            coming.staged.set()
        except Exception as error:  # a boundary: whoever waits for it must learn it
            coming.fail(error)
            return
        if self._lock.acquire(blocking=False):  # no run: nobody else would do it
            try:
                self._switch_at_rest()
            finally:
                self._lock.release()

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
            session = Session(
                number=self._attempt + 1, prompt=prompts, attention_mask=attention_mask, sampling=sampling
            )
            protection = self._protected(session)
            self._session, meter = session, Meter()
            try:
                while True:
                    try:
                        finished = yield from self._segment(session, meter, protection)
                        if finished:
                            break
                        self._switch_to_next()
                    except DeviceLost as error:
                        self._recover(session, error)
                        if session.ended:  # the fault came behind the last token
                            break
            except (DeviceLost, InputError) as error:
                self.lost = self.lost or (str(error) if isinstance(error, DeviceLost) else None)
                raise
            finally:
                self._session = None
                if protection is not None:
                    protection.end()
                self._end(session)
            self.report = meter.report(len(prompts))
            self._switch_at_rest()

    def _segment(
        self, session: Session, meter: Meter, protection: Protection | None
    ) -> Generator[list[int], None, bool]:
        """Generate until the end (True), or until a staged placement may take over (False)."""
        self._attempt += 1
        order = session.order(self._attempt, self.epoch)
        members = [str(d) for d in self.route.devices]
        for device in members:
            self._order(device, "decode", order)
        replies: dict[str, dict[str, Any]] = {}
        paused = finished = False
        try:
            while len(replies) < len(members):
                device, frame = self._next_frame(set(members) - set(replies))
                if frame.kind == Kind.TOKEN:
                    if frame.attempt == self._attempt:
                        ids = tensor_of(frame).tolist()
                        session.steps.append(ids)
                        self.tokens += 1
                        meter.arrivals.append(time.perf_counter())
                        if protection is not None:
                            protection.token()
                        yield ids
                        if not paused and self.next is not None and self._ready(self.next):
                            paused = True
                            self._stop_run()
                else:
                    replies[device] = self._reply(device, frame)
            finished = True
        finally:
            if not finished and self.lost is None and sys.exc_info()[0] is GeneratorExit:
                with contextlib.suppress(DeviceLost):  # the next run mends it
                    self._stop_run()
                    self._drain(set(members) - set(replies))
        session.valid = session.positions
        meter.add(replies)
        return not paused or session.ended

    @staticmethod
    def _ready(coming: Next) -> bool:
        return coming.staged.is_set() and not coming.done.is_set()

    def _switch_at_rest(self) -> None:
        """The same where no run goes on: a fault is mended for the next one."""
        try:
            self._switch_to_next()
        except DeviceLost as error:
            try:
                self._recover(None, error)
            except DeviceLost as again:
                self.lost = self.lost or str(again)

    def _switch_to_next(self) -> None:
        """Let the staged placement run: only between segments, with the lock held."""
        coming = self.next
        if coming is None or not self._ready(coming):
            return
        started = time.perf_counter()
        behind = {s.number: s.stop for s in coming.sessions}
        tails = [replace(s, start=behind.get(s.number, 0)) for s in self._sessions(coming)]
        try:
            answers = self.switch(coming.epoch, tails)
        except InputError as error:
            coming.fail(error)
            return
        except DeviceLost as error:
            coming.fail(error)
            raise
        if self._session is not None and not coming.copies_kv:
            self._session.valid = 0
        self.topology = coming.epoch.topology
        self._whole = coming.epoch.placement, self.topology
        coming.tail_bytes = sum(a["copied_bytes"] for a in answers.values())
        coming.pause_s = time.perf_counter() - started
        coming.done.set()

    def make_ready(self) -> None:
        """Let the others hold what they need if a device of `Recovery.stand_by` is lost."""
        recovery = self.recovery
        if recovery is None or recovery.replan is None:
            return
        for device in recovery.stand_by:
            if device in self.route.devices:
                left = without(self.topology, [device])
                then = self.now.moved(self.replan(left, self.arch.context_tokens), left, -1)
                self.ensure(then)
                orders = {
                    str(d): (
                        "ready",
                        {"load": then.load_order(d).to_plain(), "lenders": then.lenders(d, self.endpoints)},
                    )
                    for d in then.route.devices
                }
                ask(orders, self.endpoints, self.fleet.token, within_s=_LOAD_S)

    def ensure(self, epoch: Epoch) -> None:
        """Start the devices of an epoch that were not needed so far.

        Raises:
            DeviceLost: one does not come up.
        """
        for device in epoch.route.devices:
            if device not in self.endpoints:
                self.endpoints[device] = self.fleet.restart(epoch.topology.device(device))
            self.reach(device)

    def reach(self, device: str) -> None:
        """Connect to a device, unless we are."""
        if device not in self._channels:
            self.dial(device)

    def restart(self, device: str) -> None:
        """Start a dead device anew.

        Raises:
            DeviceLost: it does not come up, or it has died too often.
        """
        assert self.recovery is not None, "asked for"
        most, within_s = self.recovery.restarts, self.recovery.restarts_within_s
        recent = [t for t in self.restarted.get(device, ()) if time.monotonic() - t < within_s]
        if len(recent) >= most:
            raise DeviceLost(f"{device} has been started anew {most} times in {within_s:g} s")
        self.restarted[device] = [*recent, time.monotonic()]
        self.endpoints[device] = self.fleet.restart(self._known[DeviceId(device)])

    def replan(self, topology: Topology, context_tokens: int) -> Placement:
        """What `Recovery.replan` says.

        Raises:
            InputError: nothing fits.
        """
        assert self.recovery is not None and self.recovery.replan is not None, "asked for"
        if not isinstance(self.recovery.replan, str):
            return self.recovery.replan(topology, context_tokens)
        state = ClusterState(arch=self.arch, topology=topology, context_tokens=context_tokens)
        placement = make_planner(self.recovery.replan).propose(state)
        validate(placement, self.arch, topology)
        return placement

    def await_return(self, devices: Sequence[str]) -> None:
        """Start lost devices anew in the background and give them back what they held."""
        self._returns.wait_for(devices, *self._whole)

    def _sessions(self, coming: Next) -> list[Kept]:
        """What has to move with a placement."""
        kept = list(self._kept.values())
        session = self._session
        if session is not None and session.steps and coming.copies_kv:
            kept.append(Kept(number=session.number, capacity=session.capacity, stop=session.positions))
        return kept

    def _protected(self, session: Session) -> Protection | None:
        recovery = self.recovery
        if recovery is None or recovery.store is None:
            return None
        return Protection(self, session, url=recovery.store, every=recovery.every_tokens,
                          failures_per_s=recovery.failures_per_s)  # fmt: skip

    def _recover(self, session: Session | None, error: DeviceLost) -> None:
        """See recovery.py; without a `Recovery` the run ends here."""
        if self.recovery is None or self.lost is not None:
            raise error
        if self.next is not None and not self.next.done.is_set():
            self.next.fail(error)
        self.disturbed = True
        with self.starting:
            recovered(self, session, error)
        self.disturbed = False

    def _stop_run(self) -> None:
        """Ask for the end of the run at the next token."""
        header = (int(Kind.CANCEL), 0, self.epoch, 0, 0, self._attempt, "", ())
        self._channels[self.route.sampler].send(header)

    def _drain(self, devices: set[str]) -> None:
        while devices:
            device, frame = self._next_frame(devices)
            if frame.kind == Kind.REPLY:
                with contextlib.suppress(DeviceLost):
                    self._reply(device, frame)
                devices.discard(device)

    def _end(self, session: Session) -> None:
        if self.lost is None:
            for device in self.route.devices:
                with contextlib.suppress(DeviceLost):
                    self._order(device, "end", {"session": session.number})

    def leave(self, device: str) -> None:
        """Count no longer on a device."""
        channel = self._channels.pop(device, None)
        if channel is not None:
            channel.close()
        self.endpoints.pop(device, None)

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
            members = [str(d) for d in self.route.devices]
            for device in members:
                self._channels[device].send((int(Kind.CALL), 0, 0, 0, 0, 0, "", ()), plain)
                self._channels[device].drain_fully()
            self._kept[session] = Kept(number=session, capacity=capacity, stop=position + new_tokens)
            holders = self.placement.head.by_device
            waiting = {str(d) for d, _ in holders}
            parts: dict[str, Tensor] = {}
            while waiting:
                device, frame = self._next_frame(set(members))
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
            self._kept.pop(session, None)
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
            self._attempt += 1
            self._order(a, "echo", {"peer": b, "first": True, "attempt": self._attempt, **order})
            self._order(b, "echo", {"peer": a, "first": False, "attempt": self._attempt, **order})
            return self._replies({a, b})

    def speeds(self, device: str, *, cold_bytes: int) -> dict[str, float]:
        """How fast a device multiplies and copies while the others sleep; see runtime/speed.py."""
        with self._lock:
            self._usable()
            self._order(device, "speeds", {"cold_bytes": cold_bytes})
            rates: dict[str, float] = self._replies({device})[device]
            return rates

    def slow_links(self, bytes_per_s: float) -> None:
        """Let devices send to each other as slowly as a link of that rate would take it, 0: as fast as it goes.

        An emulation, for demonstrations and tests: the sender waits, the network is as it was.
        """
        ask(dict.fromkeys(self.endpoints, ("pace", {"bytes_per_s": bytes_per_s})), self.endpoints, self.fleet.token,
            within_s=_ANSWER_S)  # fmt: skip

    def close(self) -> None:
        """Stop every device. Idempotent."""
        self.lost = self.lost or "the engine is closed"
        self._returns.close()  # which may be starting a device just now, that must not outlive this
        for device, channel in self._channels.items():
            with contextlib.suppress(DeviceLost):
                self._order(device, "leave", {})
            channel.close()
        self._channels.clear()
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
        devices = set(self._channels)  # one may come back while these answer
        for device in devices:
            self._order(device, op, order)
        return self._replies(devices)

    def _replies(self, devices: set[str]) -> dict[str, dict[str, Any]]:
        waiting = set(devices)
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
            if not isinstance(error, InputError) and (self.recovery is None or not isinstance(error, DeviceLost)):
                self.lost = str(error)
            raise error
        return values

    def _next_frame(self, devices: set[str]) -> tuple[str, Frame]:
        """The next frame of any of the devices; looks for dead and silent ones while it waits."""
        waited_s = 0.0
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
                    waited_s += _TICK_S
                    dead = {d: why for d, why in self.fleet.dead().items() if d in self._channels}
                    if dead:
                        raise DeviceLost("; ".join(f"{d}: {why}" for d, why in dead.items()))
                    if self.recovery is not None and waited_s >= self.recovery.stall_s:
                        self._ask_for_life(devices)
                        waited_s = 0.0
        except DeviceLost as error:
            dead = self.fleet.dead()
            why = "; ".join(f"{d}: {reason}" for d, reason in dead.items() if d in devices) or str(error)
            if self.recovery is None:
                self.lost = why
            raise DeviceLost(why) from error

    def _ask_for_life(self, devices: set[str]) -> None:
        """Busy devices answer beside their work, and so do the ways between them.

        Raises:
            DeviceLost: one does not.
        """
        ask(dict.fromkeys(devices, ("ping", {})), self.endpoints, self.fleet.token, within_s=_ANSWER_S)
        for device in devices:
            peers = {b: astuple(self.endpoints[b]) for a, b in self.now.dials() if a == device}
            order = {"peers": peers, "within_s": _ANSWER_S}
            answers = ask({device: ("reach", order)}, self.endpoints, self.fleet.token,
                          within_s=_ANSWER_S * (2 + len(peers)))  # fmt: skip
            if answers[device]["unreached"]:
                raise DeviceLost(f"{device} does not reach {', '.join(answers[device]['unreached'])}")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(torch.int64).contiguous().numpy().tobytes()
