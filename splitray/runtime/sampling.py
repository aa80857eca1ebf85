"""How the next token is chosen on the sampler's device: transformers' own processors, a seeded generator."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from splitray.errors import InputError, Unsampled

_LEAST_TEMPERATURE = 1e-30  # logits of millions divided by less leave float32
_SEEDS = range(-(2**63), 2**64)  # torch's generators
_MOST = 2**63 - 1  # a message holds no larger number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks of the sampler. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", 1 <= self.max_new_tokens <= _MOST, "at least 1, in 63 bits"),
            (
                "temperature",
                self.temperature == 0 or _LEAST_TEMPERATURE <= self.temperature < math.inf,
                f"0 (greedy), or a number from {_LEAST_TEMPERATURE:g} on",
            ),
            ("top_k", 0 <= self.top_k <= _MOST, "0 (off) or more, in 63 bits"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("seed", self.seed in _SEEDS, "a number of 64 bits"),
        )
        for name, good, expected in checks:
            if not good:
                raise InputError(name, expected=expected, actual=getattr(self, name), remedy=f"correct {name}")

    @property
    def only_maximum(self) -> bool:
        """Whether the largest logit decides, so that holders of a partitioned head need send no more."""
        return self.temperature == 0 and self.repetition_penalty == 1.0


class Chooser:
    """Chooses tokens for a batch, as transformers' generate does with the same settings and seed."""

    def __init__(self, sampling: Sampling, prompt_BT: Tensor) -> None:
        """`prompt_BT` feeds the repetition penalty."""
        self.sampling = sampling
        self.ids_BT = prompt_BT
        self.finished_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature > 0:
            if sampling.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                processors.append(TopPLogitsWarper(sampling.top_p))
        self._processors = processors

    def from_logits(self, logits_BV: Tensor) -> Tensor:
        """Next ids [batch] from float32 logits of the whole vocabulary.

        Raises:
            Unsampled: the logits are no finite numbers.
            InputError: they are, but what the request asks for makes none of them.
        """
        check_maximum(logits_BV.amax(-1), self.finished_B)
        scores = self._processors(self.ids_BT, logits_BV.float())  # type: ignore[arg-type]
        if self._processors:
            top_B = scores.amax(-1)
            if not (torch.isfinite(top_B) | self.finished_B).all():
                raise InputError(
                    "sampling parameters",
                    expected="values that leave finite scores to choose by",
                    actual=f"a largest score of {top_B.tolist()} with temperature {self.sampling.temperature:g} "
                    f"and repetition_penalty {self.sampling.repetition_penalty:g}",
                    remedy="use a larger temperature (0 is greedy) and a repetition_penalty near 1",
                )
        if self.sampling.temperature == 0:
            return self.accept(scores.argmax(-1))
        probabilities = scores.softmax(-1)
        return self.accept(torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1))

    def accept(self, ids_B: Tensor) -> Tensor:
        """Take chosen ids: finished sequences get the pad id; remembers what has stopped."""
        sampling = self.sampling
        if self.finished_B.any():
            ids_B = ids_B.masked_fill(self.finished_B, sampling.pad_id)
        for stop in sampling.stop_ids:
            self.finished_B |= ids_B == stop
        if sampling.repetition_penalty != 1.0:
            self.ids_BT = torch.cat([self.ids_BT, ids_B[:, None]], dim=1)
        return ids_B

    def catch_up(self, chosen_BN: Tensor, vocab: int) -> None:
        """Go on behind tokens [batch, done] that were chosen before, the generator included."""
        for ids_B in chosen_BN.T:
            if self.sampling.temperature > 0:  # a draw takes the same numbers whatever the probabilities are
                torch.multinomial(torch.ones(ids_B.shape[0], vocab), 1, generator=self._generator)
            self.accept(ids_B)

    @property
    def done(self) -> bool:
        """Whether every sequence has stopped."""
        return bool(self.finished_B.all())


def check_maximum(value_B: Tensor, finished_B: Tensor) -> None:
    """Refuse to choose where the largest logit of a sequence that goes on is no finite number.

    Raises:
        Unsampled: one is NaN (which counts as the largest) or infinite.
    """
    for value, finished in zip(value_B.tolist(), finished_B.tolist(), strict=True):
        if not finished and not math.isfinite(value):
            raise Unsampled(
                f"no token can be chosen: the model's largest logit is {value}; its weights or this dtype give no "
                "finite numbers for this prompt (try --dtype float32, or check the weights)"
            )


def deciding(logits_BR: Tensor, sampling: Sampling, seen: int) -> Tensor:
    """What the sampler needs of one holder's logits to choose as if it had all.

    That is the best `top_k`, or the best one, and those that equal the least of them once they are divided by the
    temperature. Of `seen` tokens that a penalty may push down, each makes room for another one. All are needed where a
    penalty may lift, or for a sum over all probabilities: top_p alone.

    Returns:
        [2, batch, rows]: the logits' bits and which rows they are, int32; or the logits.
    """
    batch, rows = logits_BR.shape
    draws, penalty = sampling.temperature > 0, sampling.repetition_penalty
    count = (sampling.top_k if draws else 1) + (seen if penalty > 1 else 0)
    if penalty < 1 or (draws and not sampling.top_k) or 2 * count >= rows:
        return logits_BR
    scores_BR = logits_BR / sampling.temperature if draws else logits_BR
    least_B1 = scores_BR.topk(count, dim=-1).values[:, -1:]
    chosen_BR = ~(scores_BR < least_B1)  # what is no number, too
    most = int(chosen_BR.sum(-1).max())
    if 2 * most >= rows:
        return logits_BR
    at_BK = scores_BR.masked_fill(~chosen_BR, -math.inf).topk(most, dim=-1).indices
    return torch.stack([logits_BR.gather(-1, at_BK).view(torch.int32), at_BK.to(torch.int32)])


def fill_in(whole_BV: Tensor, rows_R: Tensor, part: Tensor) -> None:
    """Write what `deciding` gave of the vocabulary's rows `rows_R`."""
    if part.dtype == torch.int32:
        whole_BV.scatter_(-1, rows_R[part[1].to(torch.int64)], part[0].view(torch.float32))
    else:
        whole_BV[:, rows_R] = part
