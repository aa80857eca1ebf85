"""One batch of sequences being generated, as the engine knows it: all that it takes to go on, anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitray.arch import ModelArch
from splitray.errors import InputError
from splitray.runtime.checkpoint import Saved
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire.messages import DecodeOrder


@dataclass(slots=True, kw_only=True)
class Session:
    """Equally long prompts, what was generated behind them, and how far the devices and the store have their KV."""

    number: int
    prompt: list[list[int]]
    """Ids, [batch][positions]."""
    attention_mask: list[list[int]] | None
    """[batch][positions of the prompt], 0 where it is padding; None: no padding."""
    sampling: Sampling
    steps: list[list[int]] = field(default_factory=list)
    """New ids, [steps][batch]."""
    valid: int = 0
    """The position below which the devices hold the KV of all pieces as the placement has them."""
    saved: list[Saved] = field(default_factory=list)
    """Checkpoints, without gaps from position 0."""

    @property
    def positions(self) -> int:
        """Positions whose KV a fleet without a fault has: the last token is only known, not read yet."""
        return max(0, len(self.prompt[0]) + len(self.steps) - 1) if self.steps else 0

    @property
    def tokens_left(self) -> int:
        """New tokens that may yet come, a sequence."""
        return self.sampling.max_new_tokens - len(self.steps)

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence that this can become."""
        return len(self.prompt[0]) + self.sampling.max_new_tokens

    @property
    def ids(self) -> list[list[int]]:
        """All ids so far, [batch][positions]."""
        return [row + [ids[i] for ids in self.steps] for i, row in enumerate(self.prompt)]

    @property
    def ended(self) -> bool:
        """Whether every sequence has its last token."""
        if len(self.steps) >= self.sampling.max_new_tokens:
            return True
        stops = set(self.sampling.stop_ids)
        return bool(stops) and all(any(i in stops for i in row) for row in zip(*self.steps, strict=True))

    def order(self, attempt: int, epoch: int) -> DecodeOrder:
        """The order by which devices go on from here."""
        mask = self.attention_mask
        if mask is not None:
            mask = [row + [1] * len(self.steps) for row in mask]
        return DecodeOrder(
            session=self.number, attempt=attempt, epoch=epoch, prompt=self.ids, attention_mask=mask,
            sampling=self.sampling, capacity=self.capacity, start=self.valid, done=len(self.steps),
        )  # fmt: skip


def check_prompt(prompt_ids: Sequence[int], max_new_tokens: int, arch: ModelArch) -> None:
    """Refuse a prompt that cannot run.

    Raises:
        InputError: it is empty, has ids outside the vocabulary, or is too long for what is to follow.
    """
    check_ids(prompt_ids, arch.vocab)
    if len(prompt_ids) + max_new_tokens > arch.context_tokens:
        raise InputError(
            "prompt",
            expected=f"prompt and new tokens within the context of {arch.context_tokens} tokens",
            actual=f"{len(prompt_ids)} + {max_new_tokens}",
            remedy="shorten the prompt or ask for fewer new tokens",
        )


def check_ids(prompt_ids: Sequence[int], vocab: int) -> None:
    """Refuse what no embedding of so many rows can begin with.

    Raises:
        InputError: there are no ids, or some outside the vocabulary.
    """
    if not prompt_ids:
        raise InputError("prompt", expected="at least one token", actual="none", remedy="write a prompt")
    wrong = [i for i in prompt_ids if not 0 <= i < vocab]
    if wrong:
        raise InputError(
            "prompt ids",
            expected=f"ids in [0, {vocab})",
            actual=wrong[:5],
            remedy="use this model's tokenizer",
        )
