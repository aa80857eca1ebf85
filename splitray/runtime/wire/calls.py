"""Orders, answers and tensors over a connection: both ends of a call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from splitray.errors import InputError
from splitray.runtime.wire.answers import Answer, Refused, answer_of
from splitray.runtime.wire.connection import Channel
from splitray.runtime.wire.frames import Kind, header
from splitray.runtime.wire.messages import ORDERS, Order
from splitray.runtime.wire.packing import Packed, pack
from splitray.runtime.wire.tensors import DTYPE_NAMES, payload_of, tensor_of

A = TypeVar("A")
Takes = Mapping[type[Order[Any]], Callable[[Any, Any], Answer | None]]
"""Which orders are taken, and the method that carries each one out; None: nobody waits for an answer."""


def call(channel: Channel, order: Order[Any]) -> None:
    """Send an order whose answer comes later, if any comes.

    Raises:
        DeviceLost: the other end is gone.
    """
    channel.send(header(Kind.CALL), pack(order))
    channel.drain_fully()


def ask(channel: Channel, order: Order[A], take: Callable[[Tensor], None] | None = None) -> A:
    """Send an order and wait for its answer; `take` gets each tensor that comes before it.

    Raises:
        InputError: the other end refused.
        DeviceLost: it is gone, or has lost another device.
    """
    call(channel, order)
    while True:
        frame = channel.read()
        assert frame is not None, "a blocking read returns a frame"
        if frame.kind == Kind.REPLY:
            return answer_of(frame.payload, channel.peer)
        if take is not None:
            take(tensor_of(frame))


def send_tensor(channel: Channel, tensor: Tensor, kind: Kind = Kind.TENSOR) -> None:
    """Send a tensor and wait until it is on its way."""
    kept, payload = payload_of(tensor)
    channel.send(header(kind, dtype=DTYPE_NAMES[kept.dtype], shape=tuple(kept.shape)), payload)
    channel.drain_fully()


def carry_out(channel: Channel, payload: Packed, takes: Takes, owner: object) -> None:
    """Do what an order says and answer. The boundary of a device's process: every failure becomes an answer.

    Raises:
        DeviceLost: whoever gave the order is gone.
    """
    answer: Answer | None
    try:
        order = ORDERS.unpack(payload)
        if type(order) not in takes:
            raise InputError(f"order of {channel.peer}", expected=f"one of {[t.__name__ for t in takes]}",
                             actual=type(order).__name__, remedy="give it over the other connection")  # fmt: skip
        answer = takes[type(order)](owner, order)
    except Exception as error:  # noqa: BLE001
        answer = Refused.of(error)
    if answer is not None:
        channel.send(header(Kind.REPLY), pack(answer))
        channel.drain_fully()
