"""The counts of a model by its name or folder, without its weights; a name needs no torch."""

from typing import Literal

from splitray.arch import ModelArch, held_as
from splitray.catalog import ARCHITECTURES, architecture
from splitray.errors import ModelError, did_you_mean

PlanDtype = Literal["float32", "bfloat16"]


def read_model_arch(
    model: str, *, dtype: PlanDtype | None = None, weights: str | None = None, sums: str = "fixed"
) -> ModelArch:
    """The counts of a named decoder, or of a model's folder, whose weights are not read.

    `weights` is the format in which devices hold them; rows and sums are then float32. None: they have the dtype.

    Raises:
        ModelError: neither a name nor a usable folder.
    """
    if weights is not None:
        return held_as(read_model_arch(model, dtype=dtype or "float32"), weights, sums=sums)
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
