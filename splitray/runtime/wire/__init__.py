"""What travels between processes: frames, connections and the wire of a device, who may connect, orders and answers."""

from splitray.runtime.wire.connection import Channel, Pace, receive_timeout
from splitray.runtime.wire.endpoint import Endpoint, new_token
from splitray.runtime.wire.frames import Frame, Header, Key, Kind, Payload, frame_start, header
from splitray.runtime.wire.free_cores import FreeCores
from splitray.runtime.wire.waits import Waits
from splitray.runtime.wire.wire import StopRun, Wire

__all__ = [
    "Channel",
    "Endpoint",
    "Frame",
    "FreeCores",
    "Header",
    "Key",
    "Kind",
    "Pace",
    "Payload",
    "StopRun",
    "Waits",
    "Wire",
    "frame_start",
    "header",
    "new_token",
    "receive_timeout",
]
