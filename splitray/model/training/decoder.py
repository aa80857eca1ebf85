"""The untrained decoder, and how many bits a trained one needs for a text."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from splitray.model.training.settings import TinySettings

INTO_RESIDUAL = ("o_proj", "down_proj", "dense", "dense_4h_to_h")


def build_model(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the untrained decoder, with dropout on the embedding and on what each block adds."""
    grouped = {"num_key_value_heads": settings.kv_heads} if settings.architecture == "llama" else {}
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **grouped,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)

    def drop(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        # One mask for all tokens of a window: a mask for each costs a sixth of the whole step on a CPU.
        mask = torch.ones_like(output[:, :1])
        return output * nn.functional.dropout(mask, settings.dropout)

    with torch.no_grad():
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if last in INTO_RESIDUAL:
                module.weight.zero_()  # every block starts as the identity, which trains faster
            if last in ("embed_tokens", "embed_in", *INTO_RESIDUAL):
                module.register_forward_hook(drop)
    return model


def model_bits(model: PreTrainedModel, sequences: Sequence[Sequence[int]], context: int) -> float:
    """Return the total of -log2 p over all tokens of ``sequences`` but their leading bos.

    A window of ``context`` tokens moves by half its length, so that every token but those early in a
    document is scored with at least half a window before it. Nothing crosses a document.
    """
    model.eval()
    total = 0.0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor(sequence, device=device)
            start = scored = 0
            while scored < len(sequence) - 1:
                window = ids[start : start + context + 1]
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
                losses = nn.functional.cross_entropy(logits, window[1:], reduction="none")
                total += float(losses[scored - start :].sum())
                scored = start + len(window) - 1
                start += context // 2
    return total / math.log(2)
