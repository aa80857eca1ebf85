"""What transformers answers with the whole model, and where a served answer differs from it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from splitray.model.token_ids import end_ids
from splitray.profiling.served_answer import ServedAnswer
from splitray.text.decoding import Decoding
from splitray.text.stream import TextStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What transformers says to the same prompt: ids, and their text token by token."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    long_ids: tuple[int, ...] = ()
    """Of a longer answer, past any end."""


def ask_transformers(folder: str, tokenizer: Any, prompt: str, *, new_tokens: int, long_tokens: int) -> Reference:
    """The greedy answer of the whole model in this process, and a longer one that goes past any end."""
    disable_progress_bar()  # it would draw on a stderr that is no terminal too
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, length:]
        model.generation_config.eos_token_id = None
        long_ids = model.generate(**inputs, max_new_tokens=long_tokens, do_sample=False)[0, length:]
    stream = TextStream(Decoding(tokenizer), inputs["input_ids"][0].tolist(), end_ids=end_ids(folder, tokenizer))
    pieces = [stream.push(i) for i in ids.tolist()]
    texts = tuple(p for p in (*pieces, stream.flush()) if p)
    return Reference(token_ids=tuple(ids.tolist()), pieces=texts, long_ids=tuple(long_ids.tolist()))


def difference(answer: ServedAnswer, reference: Reference) -> str | None:
    """What differs first, or None.

    The API answers in text, one event a token, so tokens are compared by their number and their texts one by one:
    two tokens of a byte-level vocabulary never have the same text.
    """
    for i, (ours, theirs) in enumerate(zip(answer.pieces, reference.pieces, strict=False)):
        if ours != theirs:
            return f"tokens differ from transformers: piece {i} of the text is {ours!r} and not {theirs!r}"
    if answer.num_tokens != len(reference.token_ids) or len(answer.pieces) != len(reference.pieces):
        return f"tokens differ from transformers: {answer.num_tokens} came and not {len(reference.token_ids)}"
    return None
