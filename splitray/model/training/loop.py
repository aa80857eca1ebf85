"""The training loop of the small model: loss, steps, checks, and what it says on the way."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from splitray.model.training.batches import Batches
from splitray.model.training.muon import Muon
from splitray.model.training.settings import TinySettings


def mixed_loss(logits: torch.Tensor, ids: torch.Tensor, taught: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the mean cross-entropy per token, a ``weight`` of it against the teachers where there are any."""
    likely = torch.log_softmax(logits.float().flatten(0, 1), -1)
    hard = nn.functional.nll_loss(likely, ids[:, 1:].flatten(), reduction="none")
    count = taught.shape[0]
    if count == 0 or weight == 0:
        return hard.mean()
    soft = -(taught * likely[:count]).sum()
    return (hard.sum() + weight * (soft - hard[:count].sum())) / hard.numel()


@dataclass
class Progress:
    """Tells how far the training is: a live line on a terminal, else a line every thirty seconds."""

    live: bool = field(default_factory=lambda: sys.stderr.isatty())
    last: float = -1e9

    def tell(self, text: str, always: bool = False) -> None:
        """Print ``text`` if it is time to."""
        if always or time.monotonic() - self.last >= (0.5 if self.live else 30):
            self.last = time.monotonic()
            line_end = "" if self.live and not always else "\n"
            print(("\r\033[K" if self.live else "") + text, end=line_end, file=sys.stderr, flush=True)


@dataclass
class TrainingRun:
    """How long a training was: tokens seen, steps, processor time in seconds."""

    tokens: int
    steps: int
    cpu_seconds: float


def train(
    model: PreTrainedModel,
    batches: Batches,
    check: Callable[[], float],
    settings: TinySettings,
    save_best: Callable[[], None],
) -> TrainingRun:
    """Train until the budget of steps or of processor time is spent; call ``save_best`` at each new best.

    ``check`` is what has to fall; its own time is no part of the budget.

    Processor time and not wall-clock time counts, so a paused or crowded process still gets its share.
    """
    device = torch.device(settings.device)
    nn.Module.to(model, device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, settings.decay)
    adam = torch.optim.AdamW(others, lr=settings.vector_rate, betas=(0.9, 0.98), weight_decay=0.0)
    progress, best, due, began, step = Progress(), math.inf, 0.4, time.process_time(), 0
    while True:
        spent = time.process_time() - began
        done = step / settings.steps if settings.steps is not None else spent / (60 * settings.minutes)
        if done >= 1 or done >= due:
            due = done + 0.1
            bits = check()
            progress.tell(f"{done:4.0%}  step {step}  check {bits:.4f} bits per token", always=True)
            if bits < best:
                best = bits
                save_best()
            if done >= 1:
                return TrainingRun(batches.tokens, step, spent)
            began += time.process_time() - began - spent
        model.train()
        rate = min(1.0, (step + 1) / 20, max(0.0, (1 - done) / 0.7))
        window = settings.long_window if done >= 1 - settings.long_share else settings.window
        ids, taught = (tensor.to(device) for tensor in batches.next(window))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = mixed_loss(logits, ids, taught, settings.teaching * (1 - done))
        loss.backward()
        muon.step(settings.matrix_rate * rate)
        for group in adam.param_groups:
            group["lr"] = settings.vector_rate * rate
        adam.step()
        adam.zero_grad()
        step += 1
        progress.tell(f"{done:4.0%}  step {step}  tokens {batches.tokens:,}  loss {float(loss.detach()):.3f}")
