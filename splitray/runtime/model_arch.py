"""The counts of a model by its name or folder, without its weights; a name needs no torch."""

from dataclasses import replace
from typing import Literal

from splitray.arch import ModelArch, held_as
from splitray.catalog import ARCHITECTURES, architecture
from splitray.errors import ModelError, did_you_mean
from splitray.runtime.device_formats import on_devices
from splitray.topology import Topology
from splitray.weight_formats import AUTO_WEIGHTS, BEST_WEIGHTS, StoredWeights

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
        return on_devices(plain, topology, default, lambda: plain.auto_weights, sums=sums)
    if weights == BEST_WEIGHTS:  # whoever plans says which
        return read_model_arch(model, dtype=dtype or "float32")
    if weights is not None:
        plain = read_model_arch(model, dtype=dtype or "float32")
        return held_as(plain, plain.auto_weights if weights == AUTO_WEIGHTS else weights, sums=sums)
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
    return replace(arch, stored=_stored(model))


def _stored(model: str) -> StoredWeights | None:
    """How a model's weights are stored; as published, for a name; None: they are not here."""
    if model in ARCHITECTURES:
        return StoredWeights("bfloat16")
    from splitray.model.folder import has_weights
    from splitray.model.opened import open_checkpoint
    from splitray.runtime.launch import model_path

    folder = model_path(model)
    return open_checkpoint(folder).stored() if has_weights(folder) else None
