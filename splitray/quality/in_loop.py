"""Algorithm 1 of Chen et al.: measure perplexities while learning for T epochs, fit a surrogate, go on with that.

The paper switches USE_SURROGATE on after T epochs and says no more of it. Here the switch happens once, is kept, and
records of the surrogate's data are all that is replayed: a policy learned on-policy is not (E8).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.quality.features import PlaceFeatures
from splitray.quality.surrogate import STEPS, Record, Surrogate

Measure = Callable[[PlaceFeatures, NoisyChannel | None, Codec], float]
"""A place, a channel and a codec, to the relative perplexity that is measured now."""


@dataclass(slots=True)
class InLoop:
    """Tells relative perplexities: measured ones in the first `epochs` epochs, then the surrogate's.

    The learner calls `relative_perplexity` for each reward and `end_epoch` behind each epoch. `switched_at` is the
    number of the epoch that ended with the switch, `fit_s` how long fitting took, `measured_s` all measuring.
    """

    measure: Measure
    model: str
    epochs: int
    steps: int = STEPS
    seed: int = 0
    records: list[Record] = field(default_factory=list)
    surrogate: Surrogate | None = None
    switched_at: int | None = None
    epoch: int = 0
    measured_s: float = 0.0
    fit_s: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            remedy = "measure for one epoch or more, or load a surrogate"
            raise InputError("epochs before the surrogate", expected="at least 1", actual=self.epochs, remedy=remedy)

    @property
    def uses_surrogate(self) -> bool:
        """USE_SURROGATE of Algorithm 1: whether rewards come from the surrogate by now."""
        return self.surrogate is not None

    def relative_perplexity(self, place: PlaceFeatures, channel: NoisyChannel | None, codec: Codec = "none") -> float:
        """Relative perplexity at a channel and a cut: measured until the switch, predicted after it."""
        if self.surrogate is not None:
            return self.surrogate.predict(self.model, place, channel, codec)
        start = time.perf_counter()
        measured = self.measure(place, channel, codec)
        self.measured_s += time.perf_counter() - start
        self.records.append(
            Record(model=self.model, place=place, channel=channel, codec=codec, relative_perplexity=measured)
        )
        return measured

    def end_epoch(self) -> bool:
        """Count an epoch; True if this is the one behind which the surrogate takes over.

        Raises:
            InputError: too little was measured to fit one.
        """
        self.epoch += 1
        if self.surrogate is not None or self.epoch < self.epochs:
            return False
        start = time.perf_counter()
        self.surrogate = Surrogate.fit(self.records, steps=self.steps, seed=self.seed)
        self.fit_s, self.switched_at = time.perf_counter() - start, self.epoch
        return True
