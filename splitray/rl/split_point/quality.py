"""What a cut costs in perplexity under a channel of some strength: as it was measured, or as a surrogate tells it.

The strength is the channel's only number: the probability that an element is lost (`loss`), or the sigma of white noise
in units of the values (`sigma`). Relative perplexity has no unit, 1 is no loss. Knows no rewards.

Shapes: N questions, V strengths that were measured, P cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.channel import NoisyChannel, as_channel
from splitray.errors import InputError
from splitray.quality.features import CHANNEL_FEATURES, PlaceFeatures
from splitray.quality.in_loop import InLoop
from splitray.quality.surrogate import Surrogate
from splitray.quality.table import QualityTable

Noise = Literal["loss", "sigma"]


class Quality(Protocol):
    """Relative perplexities of the cuts 1 to `last_cut` under strengths of 0 to `strongest`."""

    @property
    def strongest(self) -> float:
        """The largest strength that it knows."""

    @property
    def last_cut(self) -> int:
        """The largest cut that it knows."""

    def relative(self, noise_N: Floats, cut_N: Ints) -> Floats:
        """Relative perplexity of each question, [N]; a strength of 0 loses nothing."""


def channel_of(noise: Noise, strength: float) -> NoisyChannel:
    """The channel that a strength means."""
    return NoisyChannel(loss=strength) if noise == "loss" else NoisyChannel(sigma=strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredQuality:
    """A table's values; straight lines between the strengths that were measured, nothing beyond them."""

    levels: Floats
    """Strengths [V], 0 first."""
    by_level: Floats
    """Relative perplexities [V, P]."""

    @staticmethod
    def of_table(table: QualityTable, noise: Noise) -> MeasuredQuality:
        """All cuts from 1 up that were measured at every strength.

        Raises:
            InputError: the table has no such channel at two cuts and more.
        """
        found: dict[float, dict[int, float]] = {}
        for row in table.rows:
            channel = as_channel(row.channel)
            if channel is None or row.codec != "none" or not row.at.startswith("cut:"):
                continue
            strength = channel.loss if noise == "loss" else channel.sigma or 0.0
            if strength and channel == channel_of(noise, strength):
                found.setdefault(strength, {})[int(row.at.removeprefix("cut:"))] = table.relative(row)
        levels = sorted(found)
        cuts = 0
        while levels and all(cuts + 1 in found[level] for level in levels):
            cuts += 1
        if cuts < 2:
            raise InputError(
                f"quality table of {table.model}",
                expected=f"channels {noise}:VALUE at the cuts 1, 2 and more",
                actual=f"{len(levels)} of them at {cuts}",
                remedy=f"measure it with `splitray perplexity --cut all --channel {noise}:VALUE/VALUE --out FILE`",
            )
        rows = [[found[level][cut] for cut in range(1, cuts + 1)] for level in levels]
        return MeasuredQuality(levels=np.array([0.0, *levels]), by_level=np.array([[1.0] * cuts, *rows]))

    @property
    def strongest(self) -> float:
        """See `Quality`."""
        return float(self.levels[-1])

    @property
    def last_cut(self) -> int:
        """See `Quality`."""
        return self.by_level.shape[1]

    def relative(self, noise_N: Floats, cut_N: Ints) -> Floats:
        """See `Quality`."""
        below = np.clip(np.searchsorted(self.levels, noise_N, "right") - 1, 0, len(self.levels) - 2)
        low, high = self.levels[below], self.levels[below + 1]
        share = np.clip((noise_N - low) / (high - low), 0.0, 1.0)
        return (1 - share) * self.by_level[below, cut_N - 1] + share * self.by_level[below + 1, cut_N - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateQuality:
    """What a fitted surrogate tells of one model."""

    surrogate: Surrogate
    model: str
    num_layers: int
    noise: Noise
    strongest: float
    last_cut: int
    _rows: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places = [PlaceFeatures.of_cut(cut, self.num_layers) for cut in range(1, self.last_cut + 1)]
        rows = [self.surrogate.question(self.model, place, None) for place in places]
        object.__setattr__(self, "_rows", np.array(rows))

    @staticmethod
    def beside(
        measured: MeasuredQuality, surrogate: Surrogate, *, model: str, num_layers: int, noise: Noise
    ) -> SurrogateQuality:
        """A surrogate's quality over the same strengths and cuts as a measured table's."""
        return SurrogateQuality(
            surrogate=surrogate, model=model, num_layers=num_layers, noise=noise, strongest=measured.strongest,
            last_cut=measured.last_cut,
        )  # fmt: skip

    def relative(self, noise_N: Floats, cut_N: Ints) -> Floats:
        """See `Quality`."""
        rows_NF = self._rows[cut_N - 1]
        rows_NF[:, CHANNEL_FEATURES.index(self.noise)] = noise_N
        return np.where(noise_N > 0, self.surrogate.relative(rows_NF), 1.0)


@dataclass(slots=True, kw_only=True)
class InLoopQuality:
    """Algorithm 1: measured one by one until `loop` switches, then told by the surrogate that was fitted to that."""

    loop: InLoop
    num_layers: int
    noise: Noise
    strongest: float
    last_cut: int
    _told: SurrogateQuality | None = None

    def relative(self, noise_N: Floats, cut_N: Ints) -> Floats:
        """See `Quality`."""
        if self._told is not None:
            return self._told.relative(noise_N, cut_N)
        return np.array([
            self.loop.relative_perplexity(
                PlaceFeatures.of_cut(int(cut), self.num_layers), channel_of(self.noise, float(noise)) if noise else None
            )
            for noise, cut in zip(noise_N, cut_N, strict=True)
        ])  # fmt: skip

    def end_epoch(self) -> None:
        """Count an epoch, and switch behind the last one that is measured."""
        if self.loop.end_epoch() and self.loop.surrogate is not None:
            self._told = SurrogateQuality(
                surrogate=self.loop.surrogate, model=self.loop.model, num_layers=self.num_layers, noise=self.noise,
                strongest=self.strongest, last_cut=self.last_cut,
            )  # fmt: skip


def measure_of(table: MeasuredQuality, noise: Noise, num_layers: int) -> Callable[..., float]:
    """A stand-in for a meter that looks measurements up, to try Algorithm 1 without waiting for them."""

    def measure(place: PlaceFeatures, channel: NoisyChannel | None, codec: object) -> float:
        strength = 0.0 if channel is None else channel.loss if noise == "loss" else channel.sigma or 0.0
        return float(table.relative(np.array([strength]), np.array([round(place.state_depth * num_layers)]))[0])

    return measure


def learned_from(
    rewards: Literal["surrogate", "measured", "in_loop"],
    measured: MeasuredQuality,
    surrogate: Surrogate,
    *,
    model: str,
    num_layers: int,
    noise: Noise,
    updates: int,
    seed: int = 0,
) -> Quality:
    """What an agent's rewards are made of: the surrogate, the table, or Algorithm 1 with the table for `updates`."""
    told = SurrogateQuality.beside(measured, surrogate, model=model, num_layers=num_layers, noise=noise)
    if rewards != "in_loop":
        return told if rewards == "surrogate" else measured
    loop = InLoop(measure=measure_of(measured, noise, num_layers), model=model, epochs=updates, seed=seed)
    return InLoopQuality(
        loop=loop, num_layers=num_layers, noise=noise, strongest=told.strongest, last_cut=told.last_cut
    )
