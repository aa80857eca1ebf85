"""In which format each device of a topology holds the weights of a model."""

from collections.abc import Callable

from splitray.arch import ModelArch, held_by
from splitray.errors import InputError
from splitray.topology import Topology
from splitray.weight_formats import AUTO_WEIGHTS, as_format


def on_devices(
    plain: ModelArch,
    topology: Topology,
    weights: str,
    stored: Callable[[], str],
    *,
    sums: str = "fixed",
    lean: bool = True,
) -> ModelArch:
    """A model with plain weights as the devices of a topology hold it: each in its own format, or else in `weights`.

    `auto` is the format in which they are stored. Kernels for few bits are the processor's: with `auto` other devices
    hold float32.

    Raises:
        InputError: a device cannot hold it so; names it.
    """
    found: dict[str, str] = {}
    for device in topology.devices:
        name, elsewhere = device.weights or weights, device.torch_device != "cpu"
        if name == AUTO_WEIGHTS:
            name = "float32" if elsewhere else stored()
        if elsewhere and as_format(name).is_held:
            what, remedy = f"device {device.id}: weights {name}", "give it `weights: float32`, or torch_device: cpu"
            raise InputError(what, expected="torch_device: cpu", actual=device.torch_device, remedy=remedy)
        found[device.id] = name
    return held_by(plain, found, sums=sums, lean=lean)
