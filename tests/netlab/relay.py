"""A way that takes its time and loses frames, for kernels without netem: a process between two TAP devices.

`python relay.py NAME NAME DELAY_S LOSS SEED` makes both devices in its own network namespace, writes a line, and hands
frames from one to the other, each `DELAY_S` later and each with the probability `LOSS` not at all. They stay in order.
The devices go with the process. It knows nothing of what the frames carry.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME_BYTES = 2048  # TAP devices offer no offloads: a frame is never longer than the MTU and its header


def tap(name: str) -> int:
    """A new TAP device; a frame is one read or write of the descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return device


def relay(a: int, b: int, *, delay_s: float, loss: float, rng: random.Random) -> None:
    """Hand frames over until the process is ended."""
    other = {a: b, b: a}
    late: deque[tuple[float, int, bytes]] = deque()  # all wait equally long, so they are due in the order they came
    while True:
        due_in_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        for device in select.select([a, b], [], [], due_in_s)[0]:
            frame = os.read(device, _FRAME_BYTES)
            if rng.random() >= loss:
                late.append((time.monotonic() + delay_s, other[device], frame))
        while late and late[0][0] <= time.monotonic():
            _, device, frame = late.popleft()
            try:
                os.write(device, frame)
            except OSError:  # the device is down or full: a frame is lost, as on any link
                continue


if __name__ == "__main__":
    first, second = (tap(name) for name in sys.argv[1:3])
    print("ready", flush=True)
    relay(first, second, delay_s=float(sys.argv[3]), loss=float(sys.argv[4]), rng=random.Random(int(sys.argv[5])))
