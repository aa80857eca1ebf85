"""Llamas with random weights, for measuring only: a recipe and its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLlama:
    """A random-weight llama that a measurement makes itself; `head_dim` is hidden / heads unless given."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    head_dim: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def write(self, folder: Path) -> Path:
        """Save its checkpoint, the same one every time, under its name; returns where."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.ffn, vocab_size=self.vocab,
            tie_word_embeddings=self.tied, max_position_embeddings=2048,
            head_dim=self.head_dim or self.hidden // self.heads,
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, self.dtype))
        model.save_pretrained(folder / self.name)
        return folder / self.name


BENCH_110M = RandomLlama(
    name="llama-110m", layers=12, hidden=768, heads=12, kv_heads=12, ffn=2048, vocab=32000, tied=True
)
BENCH_190M = RandomLlama(
    name="llama-190m", layers=16, hidden=1024, heads=16, kv_heads=4, ffn=2816, vocab=4096, tied=False
)
BENCH_1B = RandomLlama(
    name="llama-1b", layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=32000, tied=True, dtype="bfloat16"
)
"""1.04 billion weights, stored in two gigabytes."""
