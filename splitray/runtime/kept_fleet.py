"""Device processes that outlive an engine, for many short runs: starting one costs seconds, a new shard tenths."""

from collections.abc import Sequence
from typing import Self

from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.wire import Endpoint
from splitray.topology import Device


class KeptFleet:
    """A `Fleet` for one engine after another; `end` (or leaving its context) stops the processes."""

    def __init__(self, devices: Sequence[Device]) -> None:
        """Start the processes of all devices that engines may ask for.

        Raises:
            DeviceLost: a device did not come up.
        """
        self._fleet = ProcessFleet()
        self.token = self._fleet.token
        try:
            self._endpoints = self._fleet.start(devices)
        except BaseException:
            self._fleet.close()
            raise

    def start(self, devices: Sequence[Device]) -> dict[str, Endpoint]:
        """Where the devices listen; their last engine has let go of them."""
        return {d.id: self._endpoints[d.id] for d in devices}

    def pid(self, device: str) -> int:
        """Process id of a device."""
        return self._fleet.pid(device)

    def dead(self) -> dict[str, str]:
        """Processes that ended."""
        return self._fleet.dead()

    def restart(self, device: Device) -> Endpoint:
        """A new process in place of a dead one, for the engines to come too."""
        self._endpoints[device.id] = self._fleet.restart(device)
        return self._endpoints[device.id]

    def close(self) -> None:
        """The engine is done; the processes wait for the next one."""

    def end(self) -> None:
        """Stop the processes."""
        self._fleet.close()

    def __enter__(self) -> Self:
        """Use the fleet as a context: it ends itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
