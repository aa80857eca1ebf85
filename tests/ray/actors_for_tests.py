"""Actors for tests, in a module of their own: Ray would pickle a class of the running script by value."""

from __future__ import annotations

import threading

from actors.device import DeviceHost
from splitray.runtime.wire import Endpoint
from splitray.topology import Topology


class Unbuilt(DeviceHost):
    """A device whose node lacks the package."""

    def __init__(self, *_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'splitray'")


class Idle(DeviceHost):
    """A device that loads nothing, not even torch."""

    def __init__(self, *_: object, **__: object) -> None:
        self._stopped = threading.Event()

    def endpoint(self) -> Endpoint:
        return Endpoint("nobody", "127.0.0.1", 1)

    def until_stopped(self) -> None:
        self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()


class Owner:
    """An actor that has a fleet of its own, as a Serve replica does."""

    def start(self) -> int:
        """Start one idle device; returns its process id."""
        import actors.fleet  # brings torch, which idle devices do without

        actors.fleet.EdgeActor = Idle  # type: ignore[attr-defined,assignment]  # in the place of the real one
        topology = Topology.uniform(1)
        self.fleet = actors.fleet.RayFleet()
        self.fleet.start(topology.devices)
        return self.fleet.pid(topology.ids[0])
