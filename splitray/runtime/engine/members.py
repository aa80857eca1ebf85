"""The devices that an engine counts on: started, dialled, ordered, heard, and noticed when they die or fall silent.

It knows no placement and no run; what devices do is decided by whoever orders it.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from splitray.errors import DeviceLost
from splitray.runtime.engine.asking import ask
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import Fleet
from splitray.runtime.wire import Channel, Endpoint, Frame, Header, Kind
from splitray.runtime.wire.answers import answer_of
from splitray.runtime.wire.calls import call
from splitray.runtime.wire.listener import CALLER, DEADLINE_S, dial
from splitray.runtime.wire.messages import HelloOrder, LeaveOrder, Order, PingOrder, ReachOrder
from splitray.topology import Device

_TICK_S = 0.1  # how often a waiting caller looks whether a device has died
_ANSWER_S = 1.0  # a busy device has one thread for its work and another one for us
A = TypeVar("A")


class Members:
    """The devices of one engine, and the connections to them.

    Orders of a run go over one connection to each device, whose answers come in turn; questions beside it (`ask`) over
    connections of their own.
    """

    def __init__(self, fleet: Fleet, recovery: Recovery | None) -> None:
        """No device is started yet. Without a `recovery` the first device that is lost ends it all."""
        self.fleet, self.recovery = fleet, recovery
        self.endpoints: dict[str, Endpoint] = {}
        self.ways: list[tuple[str, str]] = []
        """(who opened, to whom) of the connections between devices that a run needs."""
        self.lost: str | None = None
        """Why nothing can run any more."""
        self.disturbed = False
        """Whether a fault is being seen to."""
        self.restarted: dict[str, list[float]] = {}
        self._known: dict[str, Device] = {}
        self._channels: dict[str, Channel] = {}
        self._name = f"{CALLER}/{secrets.token_hex(6)}"

    def start(self, devices: Sequence[Device]) -> None:
        """Start devices side by side and connect to them.

        Raises:
            DeviceLost: one does not come up.
        """
        self._known |= {str(d.id): d for d in devices}
        self.endpoints = dict(self.fleet.start(devices))
        for device in devices:
            self.dial(device.id)

    def ensure(self, devices: Iterable[Device]) -> None:
        """Start those that were not needed so far.

        Raises:
            DeviceLost: one does not come up.
        """
        for device in devices:
            self._known[device.id] = device
            if device.id not in self.endpoints:
                self.endpoints[device.id] = self.fleet.restart(device)
            self.reach(device.id)

    def restart(self, device: str) -> None:
        """Start a dead one anew.

        Raises:
            DeviceLost: it does not come up, or it has died too often.
        """
        assert self.recovery is not None, "asked for"
        most, within_s = self.recovery.restarts, self.recovery.restarts_within_s
        recent = [t for t in self.restarted.get(device, ()) if time.monotonic() - t < within_s]
        if len(recent) >= most:
            raise DeviceLost(f"{device} has been started anew {most} times in {within_s:g} s")
        self.restarted[device] = [*recent, time.monotonic()]
        self.endpoints[device] = self.fleet.restart(self._known[device])

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
        self.order(device, HelloOrder())
        channel.read()  # from now on nothing that is staged there is taken for an engine's before

    def reach(self, device: str) -> None:
        """Connect to a device, unless we are."""
        if device not in self._channels:
            self.dial(device)

    def leave(self, device: str) -> None:
        """Count no longer on a device."""
        channel = self._channels.pop(device, None)
        if channel is not None:
            channel.close()
        self.endpoints.pop(device, None)

    def ask(self, orders: Mapping[str, Order[A]], *, within_s: float = _ANSWER_S) -> dict[str, A]:
        """Questions beside a run, see asking.py."""
        return ask(orders, self.endpoints, self.fleet.token, within_s=within_s)

    @property
    def connected(self) -> list[str]:
        """The devices that we have a connection to."""
        return list(self._channels)

    def usable(self) -> None:
        """Raise DeviceLost if nothing can run any more."""
        if self.lost is not None:
            raise DeviceLost(f"this engine cannot run any more: {self.lost}")

    def order(self, device: str, order: Order[Any]) -> None:
        """Let a device do something."""
        call(self._channels[device], order)

    def send(self, device: str, fields: Header) -> None:
        """A frame without payload to a device."""
        channel = self._channels[device]
        channel.send(fields)
        channel.drain_fully()

    def all_say(self, order: Order[A]) -> dict[str, A]:
        """What each one answers."""
        devices = set(self.connected)  # one may come back while these answer
        for device in devices:
            self.order(device, order)
        return self.replies(devices)

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
            if self.recovery is None or not isinstance(error, DeviceLost):
                self.lost = str(error)
            raise

    def next_frame(self, devices: set[str]) -> tuple[str, Frame]:
        """The next frame of any of the devices; looks for dead and silent ones while it waits."""
        waited_s = 0.0
        try:
            while True:
                poll = select.poll()
                for device in devices:
                    channel = self._channels[device]
                    channel.take_in()
                    if channel.pending:
                        return device, channel.pending.popleft()
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
        self.ask(dict.fromkeys(devices, PingOrder()))
        for device in devices:
            peers = {b: self.endpoints[b] for a, b in self.ways if a == device}
            order = ReachOrder(peers=peers, within_s=_ANSWER_S)
            unreached = self.ask({device: order}, within_s=_ANSWER_S * (2 + len(peers)))[device].peers
            if unreached:
                raise DeviceLost(f"{device} does not reach {', '.join(unreached)}")

    def close(self) -> None:
        """Stop every device. Idempotent."""
        self.lost = self.lost or "the engine is closed"
        for device, channel in self._channels.items():
            with contextlib.suppress(DeviceLost):
                self.order(device, LeaveOrder())
            channel.close()
        self._channels.clear()
        self.fleet.close()
