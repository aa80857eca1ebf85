"""Which device sits on which node: by what the nodes offer and what is free there. Knows no Ray."""

from collections import Counter
from collections.abc import Mapping, Sequence

from splitray.errors import InputError
from splitray.topology import Device

Amounts = Mapping[str, float]
CPU, GPU = "CPU", "GPU"
_OWN_NAMES = (CPU, GPU, "memory", "object_store_memory")  # Ray's own resources, which no device id or tier may claim


def demand(device: Device, offered: Amounts, *, num_cpus: float) -> dict[str, float]:
    """What a device asks of its node.

    One unit of the resource of its id if the cluster offers that, else one of its tier's (`edge`, `cloud`) if it
    offers that; else any node will do. A device on CUDA asks for a GPU besides.

    Raises:
        InputError: the device names a GPU by number.
    """
    wanted = {CPU: num_cpus}
    named = [n for n in (device.id, device.tier) if n in offered and n not in _OWN_NAMES]
    if named:
        wanted[named[0]] = 1.0
    if device.torch_device.startswith("cuda"):
        if device.torch_device not in ("cuda", "cuda:0"):
            raise InputError(
                f"torch_device of {device.id}",
                expected="cuda, since Ray gives each device a GPU of its own, which is number 0 there",
                actual=device.torch_device,
                remedy="write torch_device: cuda",
            )
        wanted[GPU] = 1.0
    return wanted


def find_seats(demands: Mapping[str, Amounts], free: Mapping[str, Amounts]) -> dict[str, str] | None:
    """A node for each device, or None if the nodes have no room for all of them at once.

    The devices that ask for most choose first, each the fitting node with the fewest devices so far: spread out.

    `demands` are by device and resource, `free` by node and resource.
    """
    left = {node: dict(amounts) for node, amounts in free.items()}
    crowd: Counter[str] = Counter()
    seats = {}
    for device in sorted(demands, key=lambda d: -len(demands[d])):  # sorted is stable: ties in device order
        wanted = demands[device]
        fitting = [n for n, has in left.items() if all(has.get(k, 0.0) >= v for k, v in wanted.items())]
        if not fitting:
            return None
        node = min(fitting, key=lambda n: crowd[n])
        seats[device] = node
        crowd[node] += 1
        for name, amount in wanted.items():
            left[node][name] -= amount
    return seats


def no_room(demands: Mapping[str, Amounts], offered: Amounts, free: Sequence[Amounts]) -> InputError:
    """The refusal of a cluster in which `find_seats` finds no room."""
    asked = {d: {k: v for k, v in amounts.items() if k != CPU} or amounts for d, amounts in demands.items()}
    names = sorted({name for amounts in demands.values() for name in amounts})
    room = {n: f"{sum(f.get(n, 0.0) for f in free):g} of {offered.get(n, 0.0):g} free" for n in names}
    return InputError(
        "devices on the Ray cluster",
        expected=f"nodes with room for {asked} at the same time",
        actual=f"{room} on {len(free)} node(s)",
        remedy="start more nodes, each with what it offers (`ray start --address=HEAD:PORT "
        "--resources='{\"edge\": 1}'`), or stop what holds these resources; see `ray status`",
    )
