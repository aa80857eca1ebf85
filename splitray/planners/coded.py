"""Which codec to use, where a planner has prices for it: what it saves in time and energy, what it costs in quality."""

from collections.abc import Callable
from dataclasses import replace

from splitray.codecs import CODECS, Codec
from splitray.errors import InputError
from splitray.placement import Placement
from splitray.planners.checked import CheckedPlanner
from splitray.planners.drift_plus_penalty import DriftPlusPenalty, cost_of
from splitray.planners.protocol import ClusterState
from splitray.quality.accuracy import Accuracy

AUTO = "auto"


def best_codec(
    chosen: CheckedPlanner, state: ClusterState, accuracy_of: Callable[[Codec], Accuracy | None]
) -> tuple[ClusterState, Placement]:
    """Place with every codec and keep the cheapest: docs/equations.md E2.18 with the codec as one more choice.

    `chosen` is drift_plus_penalty with a V above 0, which weighs perplexity against seconds; `accuracy_of` says what a
    codec costs in quality. Codec and accuracy of the state are replaced.

    Raises:
        InputError: the planner has no price for perplexity.
    """
    planner = chosen.planner
    if not isinstance(planner, DriftPlusPenalty) or planner.v <= 0:
        raise InputError(
            "codec auto",
            expected="the planner drift_plus_penalty:V with V above 0, which prices perplexity",
            actual=chosen.spec,
            remedy="name a codec, or use for example drift_plus_penalty:10",
        )
    found = []
    for codec in CODECS:
        coded = replace(state, codec=codec, accuracy=accuracy_of(codec))
        placement = chosen.propose(coded)
        found.append((cost_of(placement, coded, planner.prices(coded)), coded, placement))
    _, best, placement = min(found, key=lambda each: each[0])
    return best, placement
