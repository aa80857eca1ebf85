"""What travels between processes: frames and channels (`wire`), who may connect (`listener`), orders (`messages`)."""

from splitray.runtime.wire.wire import (
    Channel,
    Endpoint,
    Frame,
    Key,
    Kind,
    Pace,
    StopRun,
    Wire,
    frame_start,
    new_token,
    receive_timeout,
)

__all__ = [
    "Channel",
    "Endpoint",
    "Frame",
    "Key",
    "Kind",
    "Pace",
    "StopRun",
    "Wire",
    "frame_start",
    "new_token",
    "receive_timeout",
]
