"""A model's weights, opened by what lies there: plain or quantised safetensors, or a GGUF file."""

from pathlib import Path

from splitray.model.folder import config_values, gguf_parts
from splitray.model.gguf_source import GgufSource
from splitray.model.packed_checkpoint import PackedCheckpoint
from splitray.model.source import Checkpoint
from splitray.model.weights.stored.method import method_of

Opened = Checkpoint | GgufSource


def is_plain(model: str | Path) -> bool:
    """Whether a model is such as transformers reads by itself: safetensors of plain floats."""
    return not gguf_parts(model) and method_of(config_values(model)) is None


def open_checkpoint(model: str | Path) -> Opened:
    """The source of a model's slices; headers are read.

    Raises:
        ModelError: there are no weights, or some that are not read here.
    """
    if gguf_parts(model):
        return GgufSource(model)
    method = method_of(config_values(model))
    return Checkpoint(model) if method is None else PackedCheckpoint(model, method)
