"""The devices that an engine counts on: dialled, ordered, heard, and noticed when they die or fall silent.

It owns all connections, and makes one when it is needed. It knows no placement and no run; what devices do is decided
by whoever orders it. Starting them is `starts.py`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from splitray.errors import DeviceLost
from splitray.runtime.engine.asking import Unanswered, ask
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.starts import Starts
from splitray.runtime.fleet import Fleet
from splitray.runtime.wire import Channel, Endpoint, Frame, Header, Kind
from splitray.runtime.wire.answers import answer_of
from splitray.runtime.wire.calls import call
from splitray.runtime.wire.listener import CALLER, DEADLINE_S, dial
from splitray.runtime.wire.messages import HelloOrder, LeaveOrder, Order, PingOrder, ReachOrder
from splitray.topology import Device, DeviceId, Topology

logger = logging.getLogger(__name__)
_TICK_S = 0.1  # how often a waiting caller looks whether a device has died
_ANSWER_S = 1.0  # a busy device has one thread for its work and another one for us
A = TypeVar("A")


class Endpoints(dict[str, Endpoint]):
    """Where devices listen that are there; one that is not there any more is lost, whoever asks for it."""

    def __missing__(self, device: str) -> Endpoint:
        """Raise DeviceLost: between a look and an order a device may have been left."""
        raise DeviceLost(f"{device} is not there any more")


class Members:
    """The devices of one engine, and the connections to them.

    Orders of a run go over one connection to each device, whose answers come in turn; questions beside it (`ask`) over
    connections of their own.
    """

    def __init__(self, fleet: Fleet, recovery: Recovery | None) -> None:
        """No device is started yet. Without a `recovery` the first device that is lost ends it all."""
        self.fleet, self.recovery = fleet, recovery
        self.endpoints = Endpoints()
        """Of those that are there. Never changed in place: whoever goes through it has them as they were."""
        self.ways: list[tuple[str, str]] = []
        """(who opened, to whom) of the connections between devices that a run needs."""
        self.lost: str | None = None
        """Why nothing can run any more."""
        self.disturbed = False
        """Whether a fault is being seen to."""
        self.heard_s = time.monotonic()
        """When a device was last told something or said something in a run."""
        self.starts = Starts(fleet, recovery, self._arrived)
        self._channels: dict[str, Channel] = {}
        self._owed: dict[str, list[Order[Any]]] = {}
        self._said = ""
        self._changing = threading.Lock()
        self._dialling: dict[str, threading.Lock] = {}
        self._name = f"{CALLER}/{secrets.token_hex(6)}"

    @property
    def restarted(self) -> dict[str, list[float]]:
        """When devices were started anew, see `Starts`."""
        return self.starts.restarted

    def start(self, devices: Sequence[Device]) -> None:
        """Start devices side by side and connect to them.

        Raises:
            DeviceLost: one does not come up.
        """
        self.starts.first(devices)
        for device in devices:
            self.reach(device.id)

    def ensure(self, devices: Iterable[Device]) -> None:
        """Start those that are not there, side by side, and connect to all.

        Raises:
            DeviceLost: one does not come up.
        """
        wanted = list(devices)
        if missing := [d for d in wanted if d.id not in self.endpoints]:
            self.starts.bring(missing)
        for device in wanted:
            self.reach(device.id)

    def _arrived(self, device: str, endpoint: Endpoint) -> None:
        with self._changing:
            self.endpoints = Endpoints({**self.endpoints, device: endpoint})
            self._cut_off(device)

    def reach(self, device: str) -> Channel:
        """The connection to a device, dialled if there is none.

        Raises:
            DeviceLost: it is not there, or does not answer.
        """
        with self._changing:
            dialling = self._dialling.setdefault(device, threading.Lock())
        with dialling:
            channel, endpoint = self._channels.get(device), self.endpoints.get(device)
            if channel is not None:
                return channel
            if endpoint is None:
                raise DeviceLost(self.starts.failures.get(device, f"{device} is not there"))
            channel = dial(endpoint, me=self._name, peer=device, token=self.fleet.token, deadline_s=DEADLINE_S)
            call(channel, HelloOrder())
            channel.read()  # from now on nothing that is staged there is taken for an engine's before
            with self._changing:
                for order in self._owed.pop(device, ()):
                    call(channel, order)
                self._channels[device] = channel
            return channel

    def cut_off(self, devices: Iterable[str]) -> None:
        """Hang up: whoever was made to stop has done so too, and is dialled anew when needed."""
        with self._changing:
            for device in devices:
                self._cut_off(device)

    def _cut_off(self, device: str) -> None:
        channel = self._channels.pop(device, None)
        if channel is not None:
            channel.close()

    def leave(self, device: str) -> Endpoint | None:
        """Count no longer on a device; where it was."""
        with self._changing:
            self._cut_off(device)
            self._owed.pop(device, None)
            endpoint = self.endpoints.get(device)
            self.endpoints = Endpoints({d: e for d, e in self.endpoints.items() if d != device})
            return endpoint

    def lose(self, topology: Topology, device: str) -> None:
        """Leave a device that gives no answer, and have it brought back."""
        old = self.leave(device)
        if self.recovery is not None and self.recovery.fail_back and device in topology.ids:
            self.starts.keep(topology.device(DeviceId(device)), old)

    def warn_once(self, problem: str) -> None:
        """Log a problem that may come again and again."""
        if problem != self._said:
            self._said = problem
            logger.warning("%s", problem)

    def dead(self) -> dict[str, str]:
        """Those that are counted on and have died, each with the reason."""
        return {d: why for d, why in self.fleet.dead().items() if d in self.endpoints}

    def tell_all(self, order: Order[Any]) -> None:
        """An order to each device that is there; nobody waits for an answer. Who is not connected gets it later."""
        for device in self.endpoints:
            with self._changing:
                channel = self._channels.get(device)
                if channel is None:
                    self._owed.setdefault(device, []).append(order)
                    continue
            with contextlib.suppress(DeviceLost):
                call(channel, order)

    def ask(self, orders: Mapping[str, Order[A]], *, within_s: float = _ANSWER_S, some: bool = False) -> dict[str, A]:
        """Questions beside a run, see asking.py. With `some`, those that give no answer are left out.

        An answer that takes long is waited for as long as the device gives signs of life.
        """
        patience_s = None if self.recovery is None else self.recovery.patience_s
        try:
            return ask(orders, self.endpoints, self.fleet.token, within_s=within_s, patience_s=patience_s)
        except Unanswered as error:
            if not some:
                raise
            return error.answers

    @property
    def connected(self) -> list[str]:
        """The devices that we have a connection to."""
        return list(self._channels)

    def usable(self) -> None:
        """Raise DeviceLost if nothing can run any more."""
        if self.lost is not None:
            raise DeviceLost(f"this engine cannot run any more: {self.lost}")

    def order(self, device: str, order: Order[Any]) -> None:
        """Let a device do something.

        Raises:
            DeviceLost: it is not there.
        """
        self.heard_s = time.monotonic()  # silence counts from here
        call(self._channels.get(device) or self.reach(device), order)

    def send(self, device: str, fields: Header) -> None:
        """A frame without payload to a device."""
        channel = self._channels.get(device) or self.reach(device)
        channel.send(fields)
        channel.drain_fully()

    def settle(self) -> None:
        """Let those that are connected carry out what they were told; who does not is dialled anew when needed."""
        devices = self.connected
        try:
            for device in devices:
                self.order(device, HelloOrder())
            self.replies(set(devices))
        except DeviceLost:
            self.cut_off(devices)

    def replies(self, devices: set[str]) -> dict[str, Any]:
        """An answer of each of some devices that have an order.

        Raises:
            DeviceLost: one is gone.
            InputError: one has refused.
        """
        waiting = set(devices)
        replies = {}
        while waiting:
            device, frame = self.next_frame(waiting)
            if frame.kind == Kind.REPLY:
                replies[device] = self.reply(device, frame)
                waiting.discard(device)
        return replies

    def drain(self, devices: set[str]) -> None:
        """Let devices come to the end of an order whose answer nobody needs."""
        while devices:
            device, frame = self.next_frame(devices)
            if frame.kind == Kind.REPLY:
                with contextlib.suppress(DeviceLost):
                    self.reply(device, frame)
                devices.discard(device)

    def reply(self, device: str, frame: Frame) -> Any:
        """The answer in a frame; raises the error that it reports."""
        try:
            return answer_of(frame.payload, device)
        except RuntimeError as error:  # the device's; bad input leaves it as it was
            if self.recovery is None:
                self.lost = str(error)
                raise
            raise DeviceLost(str(error)) from error  # no memory, no file: a fault like others

    def next_frame(self, devices: set[str]) -> tuple[str, Frame]:
        """The next frame of any of the devices; looks for dead and silent ones while it waits."""
        waited_s = 0.0
        try:
            while True:
                poll = select.poll()
                for device in devices:
                    channel = self._channels.get(device)
                    if channel is None:
                        raise DeviceLost(f"{device} is not there any more")
                    channel.take_in()
                    if channel.pending:
                        self.heard_s = time.monotonic()
                        return device, channel.pending.popleft()
                    poll.register(channel.sock.fileno(), select.POLLIN)
                if not poll.poll(_TICK_S * 1000):
                    waited_s += _TICK_S
                    dead = {d: why for d, why in self.fleet.dead().items() if d in devices}
                    if dead:  # of those that are waited for: the others are no fault of this
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
        self.ask(dict.fromkeys(devices, PingOrder()))
        ways = [(a, b) for a, b in self.ways if a in devices]
        for device, unreached in self.unreached(ways, within_s=_ANSWER_S).items():
            raise DeviceLost(f"{device} does not reach {', '.join(unreached)}")

    def unreached(self, ways: Sequence[tuple[str, str]], *, within_s: float) -> dict[str, tuple[str, ...]]:
        """Of (who opens, to whom) those that do not come through, by who opens.

        Raises:
            DeviceLost: a device gives no answer itself.
        """
        answers = self.ask(reach_orders(ways, self.endpoints, within_s), within_s=_ANSWER_S * (2 + len(ways)))
        return {d: tuple(a.peers) for d, a in answers.items() if a.peers}

    def close(self) -> None:
        """Stop every device. Idempotent."""
        self.lost = self.lost or "the engine is closed"
        self.starts.stop()
        for device, channel in list(self._channels.items()):
            with contextlib.suppress(DeviceLost):
                call(channel, LeaveOrder())
            self.cut_off([device])
        self.fleet.close()
        self.starts.close()


def reach_orders(
    ways: Iterable[tuple[str, str]], there: Mapping[str, Endpoint], within_s: float
) -> dict[str, ReachOrder]:
    """By who opens of (who opens, to whom): dial those of its peers that are there."""
    peers: dict[str, dict[str, Endpoint]] = {}
    for opens, to in ways:
        if opens in there and to in there:
            peers.setdefault(opens, {})[to] = there[to]
    return {device: ReachOrder(peers=found, within_s=within_s) for device, found in peers.items()}
