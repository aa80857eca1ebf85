"""The actor of a cloud worker. The name is what `ray list actors` shows; the work is DeviceHost's."""

from actors.device import DeviceHost


class CloudActor(DeviceHost):
    """A device of tier `cloud`."""
