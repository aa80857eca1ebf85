"""RayFleet keeps the promises of all fleets on three real node processes, and those that only Ray makes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
import ray
from actors_for_tests import Idle, Owner, Unbuilt
from conformance import FEW, SOON_S, Conformance, Lab, ProcessLab, eventually
from ray_nodes import RayNodes

import actors.fleet
from actors.fleet import RayFleet
from splitray.errors import DeviceLost, InputError
from splitray.topology import Topology

pytestmark = pytest.mark.ray


class RayLab(ProcessLab):
    def fleet(self) -> RayFleet:
        self._before = _living()
        return RayFleet()

    def traces(self, fleet: RayFleet) -> Callable[[], list[Any]]:
        processes, before = super().traces(fleet), self._before
        return lambda: [*processes(), *(_living() - before)]

    def devices(self, fleet: RayFleet) -> Sequence[str]:
        return list(fleet.seats)


@pytest.mark.thin(3, whole="engine")
class TestActors(Conformance):
    placements = FEW

    @pytest.fixture(scope="class")
    @classmethod
    def lab(cls, nodes: RayNodes) -> Lab:
        return RayLab()


def test_devices_without_room_are_refused_within_seconds_and_nothing_waits_for_room(nodes: RayNodes) -> None:
    before = _living()
    fleet = RayFleet(place_s=1)
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        fleet.start(Topology.uniform(4, num_edges=4).devices)
    assert time.monotonic() - started < SOON_S
    assert "'edge3': {'edge': 1.0}" in refused.value.expected
    assert "2 free" in refused.value.actual and "3 node(s)" in refused.value.actual
    assert "ray start" in refused.value.remedy
    assert eventually(lambda: _living() == before)


def test_a_device_that_cannot_be_built_gives_its_reason_and_takes_the_others_with_it(nodes, monkeypatch) -> None:
    before = _living()
    monkeypatch.setattr(actors.fleet, "EdgeActor", Unbuilt)
    monkeypatch.setattr(actors.fleet, "CloudActor", Idle)
    with pytest.raises(DeviceLost, match="edge0: its actor died: ModuleNotFoundError: No module named 'splitray'"):
        RayFleet().start(Topology.uniform(2).devices)
    assert eventually(lambda: _living() == before)


def test_a_device_goes_when_the_actor_that_started_it_is_killed(nodes: RayNodes) -> None:
    before = _living()
    owner_class: Any = ray.remote(Owner)
    owner = owner_class.options(num_cpus=0).remote()
    device = psutil.Process(ray.get(owner.start.remote(), timeout=120))
    assert device.is_running()
    ray.kill(owner)
    assert eventually(lambda: not device.is_running() and _living() == before)


def test_a_dead_device_is_told_without_waiting_and_for_good(nodes: RayNodes, monkeypatch) -> None:
    monkeypatch.setattr(actors.fleet, "EdgeActor", Idle)
    fleet = RayFleet()
    fleet.start(Topology.uniform(2, num_edges=2).devices)
    started = time.monotonic()
    assert [fleet.dead() for _ in range(100)] == [{}] * 100
    assert time.monotonic() - started < 5
    os.kill(fleet.pid("edge1"), signal.SIGKILL)
    assert eventually(lambda: fleet.dead() != {})
    told = fleet.dead()
    assert list(told) == ["edge1"] and "its actor died: The actor is dead because its worker process" in told["edge1"]
    assert fleet.dead() == told
    fleet.close()
    fleet.close()


def _living() -> set[str]:
    """Names of all actors of the cluster, and what is free of the resources that devices sit on."""
    names = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)}
    free = ray.available_resources()
    return names | {f"{name}: {free.get(name, 0):g} free" for name in ("cloud", "edge", "edge1")}
