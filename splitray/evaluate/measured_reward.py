"""What a reward costs that is measured: the perplexity of a text with the channel, timed on a part of it."""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitray.channel import NoisyChannel
from splitray.profiling.codec_loss import held_out
from splitray.profiling.perplexity import Scoring
from splitray.profiling.sweep import PerplexityMeter
from splitray.quality.table import QualityTable
from splitray.report.quantities import seconds_text

REWARD_TOKENS, REWARD_MASKS = 200_000, 5  # scored in all: a fifth of them under each mask


@dataclass(frozen=True, slots=True)
class TimedReward:
    """Seconds of one reward, extrapolated, the process's peak, and how both were found."""

    seconds: float
    peak_bytes: float
    about: str


def timed_reward(table: QualityTable, count: int) -> TimedReward:
    """Measure `count` perplexities of the table's model on a quarter of the table's tokens, at several cuts."""
    tokens = max(table.window, table.tokens // 4)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(held_out(), encoding="utf-8")
        meter = PerplexityMeter(
            Scoring(
                model=table.model,
                text=str(text),
                window=table.window,
                stride=table.stride,
                tokens=tokens + 1,
                masks=REWARD_MASKS,
            )
        )
        scored = len(meter.exact_T) * REWARD_MASKS
        seconds = []
        for i in range(count):
            started = time.perf_counter()
            meter.measure(1 + i % (meter.num_layers - 2), NoisyChannel(loss=0.1, seed=i))
            seconds.append(time.perf_counter() - started)
    mean, error = float(np.mean(seconds)), float(np.std(seconds, ddof=1) / len(seconds) ** 0.5) if count > 1 else 0.0
    whole = mean * REWARD_TOKENS / scored
    about = (
        f"One measured reward is the perplexity over {REWARD_TOKENS:,} scored tokens, {REWARD_MASKS} masks of "
        f"{REWARD_TOKENS // REWARD_MASKS:,} each: {seconds_text(whole)}, extrapolated in proportion from {count} timed "
        f"ones of {scored:,} tokens ({seconds_text(mean)} each, standard error {seconds_text(error)})."
    )
    return TimedReward(whole, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, about)
