"""What a planner would do with a model on a topology, what that is predicted to cost, and how far from the optimum."""

import time
from dataclasses import dataclass, replace
from typing import Any

from splitray.arch import ModelArch
from splitray.channel import as_channel
from splitray.codecs import Codec, as_codec
from splitray.cost import CostModel, Prediction
from splitray.errors import InputError
from splitray.fitted import fitted
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.planners.best_weights import TriedWeights, best_weights
from splitray.planners.coded import AUTO, best_codec
from splitray.planners.exact import Exact, ExactResult, solve
from splitray.planners.optimum.deadline import Deadline
from splitray.planners.protocol import ClusterState
from splitray.quality.surrogate_accuracy import accuracy_of
from splitray.quality.weight_loss import weights_loss
from splitray.route import compile_route
from splitray.topology import Topology
from splitray.weight_formats import BEST_WEIGHTS

BOUND_OVER = "every placement of heads, columns, rows and copies that the engine can execute"
DEFAULT_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPlacement:
    """What a planner proposes and what that costs; `predicted` comes from the cost model and from no measurement."""

    arch: ModelArch
    topology: Topology
    planner: str
    codec: Codec
    placement: Placement
    predicted: Prediction
    exchanges_per_token: int
    accuracy_loss: float
    """Rise of relative perplexity by codec, channel and formats, as the shipped model's measurements tell."""
    optimum: ExactResult
    """Over the planner's own action space."""
    global_optimum: ExactResult
    """Over every placement that the engine can execute: heads, columns and rows by count, copies, any ends."""
    decision_s: float
    tried: tuple[TriedWeights, ...] = ()
    """With the weights `best`: what was chosen, and the alternatives."""

    def document(self) -> dict[str, Any]:
        """What `splitray plan --json` prints."""
        predicted = self.predicted
        return {
            "model": self.arch.name,
            "grain": self.arch.grain,
            "planner": self.planner,
            "codec": self.codec,
            "weights": {str(d): self.arch.on(d).weights for d in self.topology.ids},
            "weights_tried": [t.document() for t in self.tried],
            "placement": self.placement.to_document(),
            "predicted": {
                "ttft_s": predicted.ttft_s,
                "tpot_s": predicted.tpot_s,
                "energy_j_per_token": predicted.energy_j_per_token,
                "memory_bytes": {str(d): n for d, n in predicted.memory_bytes.items()},
            },
            "exchanges_per_token": self.exchanges_per_token,
            "accuracy_loss": self.accuracy_loss,
            "optimal_tpot_s": self.optimum.tpot_s,
            "gap": predicted.tpot_s / self.optimum.tpot_s - 1,
            "global_optimal_tpot_s": self.global_optimum.tpot_s,
            "global_gap": predicted.tpot_s / self.global_optimum.tpot_s - 1,
            "lower_bound": self.global_optimum.lower_bound_s,
            "proven": self.global_optimum.proven,
            "bound_over": BOUND_OVER,
            "decision_s": self.decision_s,
        }


def priced(
    arch: ModelArch,
    topology: Topology,
    planner: str,
    *,
    context_tokens: int,
    seed: int = 0,
    codec: str = "none",
    channel: str = "none",
    limit_s: float = DEFAULT_LIMIT_S,
    weights: str | None = None,
    sums: str = "fixed",
) -> PricedPlacement:
    """Plan without starting anything.

    With the `weights` `best` the planner chooses the formats of devices that name none; `arch` is plain on these.

    After `limit_s` the optima that the placement is compared with are the best that were found until then.

    `context_tokens`, at least 1, are the KV cache to plan for, and the prompt of the predicted ttft_s. What `codec` and
    `channel` save in time and cost in quality is weighed; the codec `auto` picks one.

    Raises:
        InputError: a name or the instance is wrong; says what.
    """
    Deadline.within(limit_s)
    topology.require_connected()
    chosen = make_planner(planner, seed=seed)
    way = as_channel(channel)
    state = ClusterState(arch=arch, topology=topology, context_tokens=context_tokens)
    started, searched = time.perf_counter(), None
    tried: tuple[TriedWeights, ...] = ()
    if weights == BEST_WEIGHTS:
        if codec == AUTO:
            raise InputError("weights best", expected="a named codec beside it", actual="--codec auto",
                             remedy="let only one of the two be chosen")  # fmt: skip
        coded = as_codec(codec)
        found = best_weights(chosen, replace(state, codec=coded, accuracy=accuracy_of(coded, way)), sums=sums)
        state, tried = found.state, found.tried
        arch, topology = state.arch, state.topology
    if codec == AUTO:
        state, placement = best_codec(chosen, state, lambda each: accuracy_of(each, way))
    else:
        state = replace(state, codec=as_codec(codec), accuracy=accuracy_of(as_codec(codec), way))
        searched = None
        if isinstance(chosen.planner, Exact):  # which takes seconds: not twice
            searched = solve(state, deadline=Deadline.within(chosen.planner.limit_s or limit_s))
        placement = chosen.propose(state) if searched is None else fitted(searched.placement, arch)
    decision_s, coded, accuracy = time.perf_counter() - started, state.codec, state.accuracy
    route = compile_route(placement, arch, topology, codec=coded)
    own = searched
    if own is None:
        half = chosen.space != "all"
        own = solve(state, chosen.space, known=[placement], deadline=Deadline.within(limit_s / 2 if half else limit_s))
    overall = own
    if chosen.space != "all":
        left_s = max(limit_s / 2, limit_s - own.decision_s)
        overall = solve(state, known=[own.placement], deadline=Deadline.within(left_s))
    cost = CostModel(arch, topology, codec=coded)
    return PricedPlacement(
        arch=arch,
        topology=topology,
        planner=planner,
        codec=coded,
        placement=placement,
        predicted=cost.predict(placement, prompt_tokens=context_tokens, context_tokens=context_tokens),
        exchanges_per_token=route.exchanges_per_token,
        accuracy_loss=weights_loss(placement, arch) + (0.0 if accuracy is None else accuracy.route_loss(route)),
        optimum=own,
        global_optimum=overall,
        decision_s=decision_s,
        tried=tried,
    )
