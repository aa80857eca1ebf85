"""What a channel and a codec cost a placement in quality, as a surrogate tells it: planners weigh this against time."""

from dataclasses import dataclass

from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.quality.accuracy import Accuracy, shipped_table
from splitray.quality.features import PlaceFeatures
from splitray.quality.surrogate import Surrogate, shipped_surrogate
from splitray.route import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateAccuracy:
    """An `accuracy.Accuracy` of one channel; for another model than the fitted one a stand-in, and called that.

    Partial sums under noise of a fixed sigma are not among what the shipped surrogate was fitted to.
    """

    surrogate: Surrogate
    model: str
    channel: NoisyChannel | None

    def boundary_loss(self, codec: Codec, depth: float, boundaries: int) -> tuple[float, float]:
        """The rise of relative perplexity by one state that crosses at a depth, and by the partial sums of a boundary.

        The second is what all boundaries cost together, shared by two devices, spread evenly over them.
        """
        state = PlaceFeatures(
            states=1.0, state_depth=depth, first_state=depth, partials=0.0, partial_depth=0.0, first_partial=1.0,
            remote_share=0.0, attention_share=0.0, side_states=0.0,
        )  # fmt: skip
        count = max(1, boundaries)
        everywhere = PlaceFeatures(
            states=0.0, state_depth=0.0, first_state=1.0, partials=1.0, partial_depth=(count + 1) / (2 * count),
            first_partial=1 / count, remote_share=0.5, attention_share=0.5, side_states=1.0,
        )  # fmt: skip
        return self._rise(state, codec), self._rise(everywhere, codec) / count

    def route_loss(self, route: Route) -> float:
        """The rise of relative perplexity by all that crosses; 0 where the residual at the head has met no wire."""
        place = PlaceFeatures.of_route(route)
        return self._rise(place, route.codec) if place.states or place.partials else 0.0

    def _rise(self, place: PlaceFeatures, codec: Codec) -> float:
        return self.surrogate.predict(self.model, place, self.channel, codec) - 1


def accuracy_of(codec: Codec, channel: NoisyChannel | None) -> Accuracy | None:
    """What the shipped model's measurements tell of a codec, its surrogate of a channel; None where nothing is lost."""
    if channel is not None:
        return SurrogateAccuracy(surrogate=shipped_surrogate(), model="tiny", channel=channel)
    return None if codec == "none" else shipped_table()
