"""The fleet on a Ray cluster: one actor for each device, on the node that the topology means.

Ray starts, places and watches; orders and tensors go over splitray's own sockets. It knows no models.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cloud import CloudActor
from actors.cluster import Membership
from actors.device import DeviceHost, Seat
from actors.edge import EdgeActor
from actors.seating import CPU, GPU, demand, find_seats, no_room
from splitray.errors import DeviceLost, InputError
from splitray.runtime.fleet import Fleet
from splitray.runtime.wire import Endpoint, new_token
from splitray.runtime.wire.listener import DEADLINE_S
from splitray.topology import Device

# A device's share of a node's CPUs in Ray's books. It is a place, not a rate: the topology says who computes what,
# and eight devices must fit on a laptop whose CPUs Ray counts as two.
NUM_CPUS = 0.01
_CALLS_AT_ONCE = 4  # until_stopped holds one thread for good; ping and stop must get past it
_STOP_S = 2.0
_LOOK_S = 0.2


class RayFleet(Fleet):
    """Devices as Ray actors. They live until `close`, or as long as the driver or the actor that started them."""

    def __init__(
        self,
        *,
        threads: int = 1,
        deadline_s: float = DEADLINE_S,
        namespace: str | None = None,
        address: str | None = None,
        num_cpus: float = NUM_CPUS,
        resources: Mapping[str, Mapping[str, float]] | None = None,
        max_restarts: int = 0,
        place_s: float = 10.0,
        start_s: float = 120.0,
    ) -> None:
        """Nothing happens before `start`.

        Args:
            threads: torch threads of each device.
            deadline_s: a device that waits longer for a peer gives up.
            namespace: Ray namespace of the actors.
            address: see Membership; only where this process is in no cluster yet.
            num_cpus: what each device books of its node's CPUs.
            resources: device -> resources that its node must offer, instead of those of its id or tier.
            max_restarts: how often Ray restarts a dead actor; a restarted one holds no shard.
            place_s: how long to wait for room in the cluster (longer where nodes are started on demand).
            start_s: how long the processes may take until they listen.
        """
        self.token = new_token()
        self.seats: dict[str, Seat] = {}
        self._threads, self._deadline_s = threads, deadline_s
        self._namespace, self._address = namespace, address
        self._num_cpus, self._resources, self._max_restarts = num_cpus, dict(resources or {}), max_restarts
        self._place_s, self._start_s = place_s, start_s
        self._membership: Membership | None = None
        self._actors: dict[str, ActorHandle] = {}
        self._ends: dict[ray.ObjectRef, str] = {}  # a pending call for each living device; it ends when the device does
        self._dead: dict[str, str] = {}
        self._lock, self._closed = threading.RLock(), False  # restarts run side by side, and beside `dead`
        self._demands: dict[str, dict[str, float]] = {}  # what each device asked for at first: a node may be gone since

    def start(self, devices: Sequence[Device]) -> dict[str, Endpoint]:
        """Start the actors, each on the node that `seating` finds for it, and wait until all of them listen.

        Raises:
            InputError: the cluster has no room for all of them, or a device names a GPU by number.
            DeviceLost: a device did not come up.
        """
        assert not self._actors, "a fleet starts once"
        try:
            self._membership = Membership(address=self._address, namespace=self._namespace)
            demands, nodes = self._seated(devices)
            for device in devices:
                self._actors[device.id] = self._actor(device, demands[device.id], nodes[device.id])
            give_up = time.monotonic() + self._start_s
            calls = {d: (a.endpoint.remote(), a.ping.remote()) for d, a in self._actors.items()}
            endpoints = {}
            for device_id, refs in calls.items():
                endpoints[device_id], self.seats[device_id] = self._answers(device_id, refs, give_up)
            self._ends = {a.until_stopped.remote(): d for d, a in self._actors.items()}
        except BaseException:
            self.close()
            raise
        return endpoints

    def dead(self) -> dict[str, str]:
        """Devices whose actor has died or stopped serving. Does not wait."""
        with self._lock:
            if self._ends and not ray.is_initialized():  # ray.wait would start a new cluster
                return dict.fromkeys(self._actors, "this process has left the Ray cluster")
            for ref in self._ended(0.0):
                self._dead[self._ends.pop(ref)] = _end(ref)
            return dict(self._dead)

    def restart(self, device: Device) -> Endpoint:
        """Start a dead device's actor anew, on any node that offers what it asks for: its own may be gone.

        Raises:
            DeviceLost: there is no room, or it did not come up.
        """
        with self._lock:
            before = self._actors.pop(device.id, None)
            self._ends = {ref: d for ref, d in self._ends.items() if d != device.id}
        if before is not None:
            ray.kill(before)
        try:
            demands, nodes = self._seated([device])
        except InputError as error:
            raise DeviceLost(f"{device.id}: {error}") from error
        with self._lock:
            if self._closed:
                raise DeviceLost(f"{device.id}: the fleet is closed")
            actor = self._actors[device.id] = self._actor(device, demands[device.id], nodes[device.id])
        refs = (actor.endpoint.remote(), actor.ping.remote())
        endpoint, seat = self._answers(device.id, refs, time.monotonic() + self._start_s)
        with self._lock:
            self.seats[device.id] = seat
            self._ends[actor.until_stopped.remote()] = device.id
            self._dead.pop(device.id, None)
        return endpoint

    def pid(self, device: str) -> int:
        """Process id of a device, on its node."""
        return self.seats[device].pid

    def close(self) -> None:
        """Stop every device; nothing is left running. Idempotent."""
        with self._lock:
            self._closed = True
        if ray.is_initialized():
            self._stop()
        self._actors, self._ends = {}, {}
        if self._membership is not None:
            self._membership.leave()

    def _stop(self) -> None:
        for device in self._ends.values():
            self._actors[device].stop.remote()
        self._ended(_STOP_S)  # those that answer free their sockets themselves; the others lose them with the process
        here = ray.get_runtime_context().get_node_id()
        processes = [_process(seat.pid) for seat in self.seats.values() if seat.node_id == here]
        for actor in self._actors.values():
            ray.kill(actor)
        # Ray ends processes a little later than it says; those of this node can be waited for.
        psutil.wait_procs([p for p in processes if p is not None], timeout=_STOP_S)

    def _ended(self, timeout_s: float) -> list[ray.ObjectRef]:
        refs = list(self._ends)
        return ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)[0] if refs else []

    def _seated(self, devices: Sequence[Device]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """What each device asks for and the node it goes to; waits for room, but not for long."""
        give_up = time.monotonic() + self._place_s
        while True:
            offered, free = ray.cluster_resources(), available_resources_per_node()
            demands = {str(d.id): self._demands.get(d.id) or self._demand(d, offered) for d in devices}
            nodes = find_seats(demands, free)
            if nodes is not None:
                self._demands |= demands
                return demands, nodes
            if time.monotonic() > give_up or self._closed:
                raise no_room(demands, offered, list(free.values()))
            time.sleep(_LOOK_S)  # a fleet that has just closed may free its resources yet

    def _demand(self, device: Device, offered: Mapping[str, float]) -> dict[str, float]:
        own = self._resources.get(device.id)
        wanted = demand(device, offered if own is None else {}, num_cpus=self._num_cpus)
        return wanted | dict(own or {})

    def _actor(self, device: Device, wanted: Mapping[str, float], node: str) -> ActorHandle:
        host: type[DeviceHost] = EdgeActor if device.tier == "edge" else CloudActor
        actor_class: Any = ray.remote(host)
        return actor_class.options(
            name=f"{device.id}-{secrets.token_hex(4)}",
            namespace=self._namespace,
            num_cpus=wanted[CPU],
            num_gpus=wanted.get(GPU, 0),
            resources={k: v for k, v in wanted.items() if k not in (CPU, GPU)},
            max_concurrency=_CALLS_AT_ONCE,
            max_restarts=self._max_restarts,
            # Soft: an actor that is restarted because its node is gone may sit on another one that offers the same.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        ).remote(device.id, token=self.token, threads=self._threads, deadline_s=self._deadline_s)

    def _answers(self, device: str, refs: tuple[Any, Any], give_up: float) -> tuple[Endpoint, Seat]:
        try:
            endpoint, seat = ray.get(list(refs), timeout=max(0.0, give_up - time.monotonic()))
        except GetTimeoutError as error:
            raise DeviceLost(f"{device}: its actor did not listen within {self._start_s:g} s") from error
        except RayActorError as error:
            raise DeviceLost(f"{device}: {_reason(error)}") from error
        return endpoint, seat


def _process(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _end(ref: Any) -> str:
    """Why an `until_stopped` call ended."""
    try:
        ray.get(ref, timeout=_STOP_S)
    except RayError as error:
        return _reason(error)
    return "its actor stopped serving"


def _reason(error: Exception) -> str:
    """Ray's reason in one line: the exception at the end of a traceback, or what is known of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"its actor died: {lines[-1].partition(' Some common causes')[0]}"
