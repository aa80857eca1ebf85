"""An engine without devices: it says what the test scripted, one token at a time, and keeps a record."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from splitray.runtime.sampling import Sampling

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_TOKENS = 200


@cache
def _core() -> str:
    """A byte-level BPE: any text has ids, and most characters beyond ASCII need several."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat and the other cat sat on that hat"], trainer)
    return core.to_str()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh one, because some tests change it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core()),
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


@dataclass
class Run:
    """What one generation was asked and how it ended."""

    prompt_ids: list[int]
    sampling: Sampling
    num_out: int = 0
    ended: bool = False
    closed_early: bool = False


@dataclass
class FakeEngine:
    """`reply` is the text answered to a prompt; `say` may give the ids directly. `tokenizer` may be None."""

    reply: Callable[[str], str] = lambda prompt: prompt.upper()
    say: Callable[[list[int]], list[int]] | None = None
    ends: bool = True
    delay_s: float = 0.0
    error_before: Exception | None = None
    error_after: tuple[int, Exception] | None = None
    tokenizer: Any = field(default_factory=byte_tokenizer)
    runs: list[Run] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    closed: bool = False
    lost: str | None = None
    recovers: bool = False
    model_path: str = ""

    @property
    def arch(self) -> SimpleNamespace:
        return SimpleNamespace(context_tokens=CONTEXT_TOKENS, vocab=max(300, len(self.tokenizer or ())))

    def ids(self, prompt_ids: list[int]) -> list[int]:
        if self.say:
            return self.say(prompt_ids)
        ids = self.tokenizer(self.reply(self.tokenizer.decode(prompt_ids)))["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if self.ends else ids * 100

    def stream(self, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
        self.threads.add(threading.get_ident())
        run = Run(prompt_ids, sampling)
        self.runs.append(run)
        assert sum(not (r.ended or r.closed_early) for r in self.runs) == 1, "two generations at once"
        try:
            if self.error_before:
                raise self.error_before
            for token_id in self.ids(prompt_ids)[: sampling.max_new_tokens]:
                if self.error_after and run.num_out == self.error_after[0]:
                    raise self.error_after[1]
                time.sleep(self.delay_s)
                run.num_out += 1
                yield token_id
                if token_id in sampling.stop_ids:
                    break
            run.ended = True
        finally:
            run.closed_early = not run.ended

    def close(self) -> None:
        self.closed = True
