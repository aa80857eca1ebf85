"""Sizes and budget of a training of the small model."""

from dataclasses import dataclass

ARCHITECTURES = {"llama": "Llama", "gpt_neox": "GPT-NeoX"}
"""What can be trained, by its name in transformers: the second one has layer norms, biases and parallel blocks."""


@dataclass(frozen=True)
class TinySettings:
    """Everything that decides the result but the text; the defaults are those of the shipped model.

    `minutes` are of processor time, windows are in tokens, `teaching` is the share of the loss, falling to 0, that is
    taken against n-gram teachers: their distributions tell far more per token than the one token that follows, and so
    save most of the early steps.
    """

    architecture: str = "llama"
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024
    window: int = 128
    long_window: int = 512
    long_share: float = 0.15
    batch_tokens: int = 2048
    chat_share: float = 0.15
    teaching: float = 0.6
    dropout: float = 0.05
    matrix_rate: float = 0.02
    vector_rate: float = 0.01
    decay: float = 0.05
    seed: int = 1
    device: str = "cpu"
    minutes: float = 50.0
    steps: int | None = None
