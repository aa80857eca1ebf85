"""Questions to devices beside the run, each over a connection of its own, so that none waits for another's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from splitray.errors import DeviceLost
from splitray.runtime.wire import Channel, Endpoint, Kind
from splitray.runtime.wire.listener import SIDE_OF_ENGINE, dial
from splitray.runtime.wire.messages import error_from_plain

Orders = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Device -> operation and what it needs."""


class Unanswered(DeviceLost):
    """Devices that gave no answer, by name, with the reason."""

    def __init__(self, silent: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{d}: {why}" for d, why in silent.items()))
        self.silent = dict(silent)


def ask(
    orders: Orders, endpoints: Mapping[str, Endpoint], token: bytes, *, within_s: float
) -> dict[str, dict[str, Any]]:
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
    answers: dict[str, dict[str, Any]] = {}
    try:
        for device, (op, order) in orders.items():
            try:
                channel = dial(endpoints[device], me=SIDE_OF_ENGINE, peer=device, token=token, deadline_s=within_s,
                               within_s=min(within_s, 10.0))  # fmt: skip
                channels[device] = channel
                channel.send((int(Kind.CALL), 0, 0, 0, 0, 0, "", ()), msgpack.packb({"op": op, **order}))
                channel.drain_fully()
            except DeviceLost as error:
                silent[device] = str(error)
        for device, channel in channels.items():
            if device in silent:
                continue
            try:
                frame = channel.read()
            except DeviceLost as error:
                silent[device] = str(error)
                continue
            assert frame is not None, "a blocking read returns a frame"
            values = msgpack.unpackb(bytes(frame.payload), strict_map_key=False)
            if "error" in values:
                reported = error_from_plain(values["error"], device)
                if not isinstance(reported, DeviceLost):
                    raise reported
                silent[device] = str(reported)
            else:
                answers[device] = values
    finally:
        for channel in channels.values():
            channel.close()
    if silent:
        raise Unanswered(silent)
    return answers
