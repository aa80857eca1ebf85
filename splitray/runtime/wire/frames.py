"""One frame: a six-byte prefix, a small positional msgpack header and a raw tensor buffer; no pickle."""

import struct
from enum import IntEnum
from typing import NamedTuple

import msgpack

PREFIX = struct.Struct("<IH")
"""Bytes of header and payload together, then bytes of the header."""
Payload = bytes | bytearray | memoryview
Header = tuple[int, int, int, int, int, int, str, tuple[int, ...]]
"""The fields of a `Frame` without its payload."""


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 0
    TENSOR = 1
    LAST = 2  # a token after which the run ends
    STOP = 3  # the run ends: passed on along the route
    CALL = 4
    REPLY = 5
    TOKEN = 6
    CANCEL = 7


def header(
    kind: Kind,
    session: int = 0,
    epoch: int = 0,
    boundary: int = 0,
    position: int = 0,
    attempt: int = 0,
    dtype: str = "",
    shape: tuple[int, ...] = (),
) -> Header:
    """What stands before a payload; see `Frame`. Orders and answers need no more than their kind."""
    return (int(kind), session, epoch, boundary, position, attempt, dtype, shape)


def frame_start(fields: Header, payload_bytes: int) -> bytes:
    """Prefix and packed header of a frame."""
    head = msgpack.packb(fields)
    return PREFIX.pack(len(head) + payload_bytes, len(head)) + head


class Key(NamedTuple):
    """Where in a run a frame belongs; later keys compare greater."""

    attempt: int
    position: int
    boundary: int


class Frame(NamedTuple):
    """One received frame; `shape` and `dtype` describe the payload."""

    kind: int
    session: int
    epoch: int
    boundary: int
    position: int
    attempt: int
    dtype: str
    shape: tuple[int, ...]
    payload: bytearray

    @property
    def key(self) -> Key:
        """The frame's place in its run."""
        return Key(self.attempt, self.position, self.boundary)
