"""The actor of an edge device. The name is what `ray list actors` shows; the work is DeviceHost's."""

from actors.device import DeviceHost


class EdgeActor(DeviceHost):
    """A device of tier `edge`."""
