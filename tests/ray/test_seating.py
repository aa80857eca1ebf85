"""Who sits where, decided without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.seating import demand, find_seats, no_room
from splitray.errors import InputError
from splitray.topology import DeviceId, Topology

EDGE0, EDGE1, CLOUD0 = Topology.uniform(3, num_edges=2).devices
SEATED = {
    "a tier's resource decides": (
        {"n1": {"cloud": 1}, "n2": {"edge": 2}},
        {"edge0": "n2", "edge1": "n2", "cloud0": "n1"},
    ),
    "a resource of the device's id comes before its tier's": (
        {"n1": {"cloud": 1, "edge": 1}, "n2": {"edge1": 1}},
        {"edge0": "n1", "edge1": "n2", "cloud0": "n1"},
    ),
    "devices of a tier spread over its nodes": (
        {"n1": {"edge": 2}, "n2": {"edge": 2}, "n3": {"cloud": 1}},
        {"edge0": "n1", "edge1": "n2", "cloud0": "n3"},
    ),
    "a tier that nobody offers sits anywhere": (
        {"n1": {"edge": 2}, "n2": {}},
        {"edge0": "n1", "edge1": "n1", "cloud0": "n2"},
    ),
    "one node takes all where nothing is offered": (
        {"n1": {}},
        {"edge0": "n1", "edge1": "n1", "cloud0": "n1"},
    ),
    "a unit is taken once": ({"n1": {"edge": 1}, "n2": {"cloud": 1}}, None),
    "a node without a CPU to spare takes nobody": ({"n1": {"CPU": 0.0}}, None),
}


@pytest.mark.parametrize(("nodes", "seats"), SEATED.values(), ids=SEATED)
def test_devices_sit_where_the_nodes_offer(nodes: dict[str, dict[str, float]], seats: dict[str, str] | None) -> None:
    free = {node: {"CPU": 2.0} | amounts for node, amounts in nodes.items()}
    offered = {name: sum(f.get(name, 0) for f in free.values()) for f in free.values() for name in f}
    demands = {str(d.id): demand(d, offered, num_cpus=0.01) for d in (EDGE0, EDGE1, CLOUD0)}
    assert find_seats(demands, free) == seats


def test_a_device_on_cuda_sits_where_a_gpu_is_and_chooses_first() -> None:
    free = {"n1": {"CPU": 2, "edge": 1, "GPU": 1}, "n2": {"CPU": 2, "edge": 1}}
    devices = (EDGE0, replace(EDGE1, torch_device="cuda"))
    demands = {str(d.id): demand(d, {"edge": 2, "GPU": 1}, num_cpus=0.01) for d in devices}
    assert find_seats(demands, free) == {"edge0": "n2", "edge1": "n1"}


def test_a_numbered_gpu_is_refused_because_ray_numbers_them_itself() -> None:
    with pytest.raises(InputError, match="torch_device of edge0") as refused:
        demand(replace(EDGE0, torch_device="cuda:1"), {}, num_cpus=0.01)
    assert "torch_device: cuda" in refused.value.remedy


def test_a_device_named_as_a_resource_of_rays_own_does_not_claim_it() -> None:
    assert demand(replace(EDGE0, id=DeviceId("GPU")), {"GPU": 4, "CPU": 8}, num_cpus=0.01) == {"CPU": 0.01}


def test_the_refusal_says_who_wants_what_and_what_there_is() -> None:
    error = no_room({"edge0": {"CPU": 0.01, "edge": 1.0}}, {"edge": 2.0, "CPU": 4}, [{"CPU": 4.0}, {"edge": 0.0}])
    assert "{'edge0': {'edge': 1.0}}" in error.expected
    assert "'edge': '0 of 2 free'" in error.actual and "2 node(s)" in error.actual
    assert "ray start" in error.remedy
