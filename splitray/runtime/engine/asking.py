"""Questions to devices beside the run, each over a connection of its own, so that none waits for another's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from splitray.errors import DeviceLost
from splitray.runtime.wire import Channel, Endpoint
from splitray.runtime.wire.answers import answer_of
from splitray.runtime.wire.calls import call
from splitray.runtime.wire.listener import SIDE_OF_ENGINE, dial
from splitray.runtime.wire.messages import Order

A = TypeVar("A")


class Unanswered(DeviceLost):
    """Devices that gave no answer, by name, with the reason."""

    def __init__(self, silent: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{d}: {why}" for d, why in silent.items()))
        self.silent = dict(silent)


def ask(
    orders: Mapping[str, Order[A]], endpoints: Mapping[str, Endpoint], token: bytes, *, within_s: float
) -> dict[str, A]:
    """Ask all at once and wait for all of their answers.

    Args:
        orders: what to ask of whom.
        endpoints: where devices listen.
        token: of the cluster.
        within_s: of silence after which a device counts as gone.

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
                channels[device] = dial(endpoints[device], me=SIDE_OF_ENGINE, peer=device, token=token,
                                        deadline_s=within_s, within_s=min(within_s, 10.0))  # fmt: skip
                call(channels[device], order)
            except DeviceLost as error:
                silent[device] = str(error)
        for device, channel in channels.items():
            if device in silent:
                continue
            try:
                frame = channel.read()
                assert frame is not None, "a blocking read returns a frame"
                answers[device] = answer_of(frame.payload, device)
            except DeviceLost as error:
                silent[device] = str(error)
    finally:
        for channel in channels.values():
            channel.close()
    if silent:
        raise Unanswered(silent)
    return answers
