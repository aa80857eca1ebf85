"""Questions to devices beside the run, each over a connection of its own, so that none waits for another's answer."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from splitray.errors import DeviceLost
from splitray.runtime.wire import Channel, Endpoint
from splitray.runtime.wire.answers import answer_of
from splitray.runtime.wire.calls import call
from splitray.runtime.wire.listener import SIDE_OF_ENGINE, dial
from splitray.runtime.wire.messages import Order, PingOrder

A = TypeVar("A")
_DIAL_S = 10.0
_PING_EVERY_S = 1.0


class Unanswered(DeviceLost):
    """Devices that gave no answer, by name, with the reason; and the answers of the others."""

    def __init__(self, silent: Mapping[str, str], answers: Mapping[str, Any]) -> None:
        super().__init__("; ".join(f"{d}: {why}" for d, why in silent.items()))
        self.silent, self.answers = dict(silent), dict(answers)


def ask(
    orders: Mapping[str, Order[A]], endpoints: Mapping[str, Endpoint], token: bytes, *, within_s: float,
    patience_s: float | None = None,
) -> dict[str, A]:  # fmt: skip
    """Ask all at once and wait for all of their answers.

    Args:
        orders: what to ask of whom.
        endpoints: where devices listen.
        token: of the cluster.
        within_s: of silence after which a device counts as gone.
        patience_s: the same for one that has work to do for longer, and is asked every second meanwhile whether it
            lives; None: it is not asked.

    Raises:
        Unanswered: devices did not answer.
        InputError: a device refused, for example a model that it does not have.
    """
    channels: dict[str, Channel] = {}
    silent: dict[str, str] = {}
    answers: dict[str, A] = {}
    try:
        for device, order in orders.items():
            try:
                if device not in endpoints:
                    raise DeviceLost(f"{device} is not there")
                channels[device] = dial(endpoints[device], me=SIDE_OF_ENGINE, peer=device, token=token,
                                        deadline_s=within_s, within_s=min(within_s, _DIAL_S))  # fmt: skip
                call(channels[device], order)
            except DeviceLost as error:
                silent[device] = str(error)
        waiting = {d: c for d, c in channels.items() if d not in silent}
        began = time.monotonic()  # dialling others took time that is not theirs
        lived = dict.fromkeys(waiting, began)
        while waiting:
            for device in _heard(waiting, min(_PING_EVERY_S, within_s)):
                channel = waiting[device]
                try:
                    channel.take_in()
                    if channel.pending:
                        del waiting[device]
                        answers[device] = answer_of(channel.pending.popleft().payload, device)
                except DeviceLost as error:
                    waiting.pop(device, None)
                    silent[device] = str(error)
            now = time.monotonic()
            for device in list(waiting):
                if now - began > within_s:
                    silent[device] = f"{device} gave no answer for {within_s:g} s"
                elif patience_s is not None and now - lived[device] > _PING_EVERY_S:
                    if _lives(endpoints[device], device, token):
                        lived[device] = time.monotonic()
                    elif now - lived[device] > patience_s:
                        silent[device] = f"{device} gave no sign of life for {patience_s:g} s"
                if device in silent:
                    del waiting[device]
    finally:
        for channel in channels.values():
            channel.close()
    if silent:
        raise Unanswered(silent, answers)
    return answers


def _heard(waiting: Mapping[str, Channel], within_s: float) -> list[str]:
    """Who has said something, or hung up."""
    poll = select.poll()
    by_descriptor = {c.sock.fileno(): d for d, c in waiting.items()}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(within_s * 1000)]


def _lives(endpoint: Endpoint, device: str, token: bytes) -> bool:
    try:
        ask({device: PingOrder()}, {device: endpoint}, token, within_s=_PING_EVERY_S)
    except DeviceLost:
        return False
    return True
