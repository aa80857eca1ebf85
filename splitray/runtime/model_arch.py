"""The counts of a model by its name or folder, without its weights, and as devices hold it; a name needs no torch."""

from collections.abc import Callable
from typing import Literal

from splitray.arch import ModelArch, held_as, held_by
from splitray.catalog import ARCHITECTURES, architecture
from splitray.errors import InputError, ModelError, did_you_mean
from splitray.topology import Topology
from splitray.weight_formats import AUTO_WEIGHTS, BEST_WEIGHTS, as_format

PlanDtype = Literal["float32", "bfloat16"]


def read_model_arch(
    model: str,
    *,
    dtype: PlanDtype | None = None,
    weights: str | None = None,
    sums: str = "fixed",
    topology: Topology | None = None,
) -> ModelArch:
    """The counts of a named decoder, or of a model's folder, whose weights are not read.

    `weights` is the format in which devices hold them, but for those of the `topology` that name their own; rows and
    sums are then float32. None: they have the dtype.

    Raises:
        ModelError: neither a name nor a usable folder.
        InputError: there is no such format, or the model cannot be held in it.
    """
    if topology is not None and any(d.weights for d in topology.devices):
        plain = read_model_arch(model, dtype=dtype or "float32")
        default = None if weights == BEST_WEIGHTS else weights
        default = default or ("bfloat16" if model in ARCHITECTURES and dtype is None else "float32")
        return on_devices(plain, topology, default, lambda: _stored(model), sums=sums)
    if weights == BEST_WEIGHTS:  # whoever plans says which
        return read_model_arch(model, dtype=dtype or "float32")
    if weights is not None:
        plain = read_model_arch(model, dtype=dtype or "float32")
        return held_as(plain, _stored(model) if weights == AUTO_WEIGHTS else weights, sums=sums)
    if model in ARCHITECTURES:
        return architecture(model, dtype=dtype or "bfloat16")
    from splitray.model.reading import read_arch, read_config
    from splitray.runtime.launch import model_path

    folder = model_path(model)
    try:
        config = read_config(folder)
    except ModelError as error:
        if folder.exists():
            raise
        known = [*ARCHITECTURES, "tiny"]
        raise ModelError(
            f"model {model}",
            expected=f"one of {', '.join(known)}, or a model's folder",
            actual="neither a known name nor a folder",
            remedy=f"use a known name{did_you_mean(model, known)}, or give the path of a saved model",
        ) from error
    arch, _ = read_arch(config, dtype=dtype or "float32")
    return arch


def _stored(model: str) -> str:
    """The format in which a model is stored; that in which it was published, for a name."""
    if model in ARCHITECTURES:
        return "bfloat16"
    from splitray.model.folder import has_weights
    from splitray.model.source import Checkpoint
    from splitray.runtime.launch import model_path

    folder = model_path(model)
    return Checkpoint(folder).stored_format() if has_weights(folder) else "float32"


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
