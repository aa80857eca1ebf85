"""`--weights best`: the format of each device's weights, by what it saves in time and energy and costs in quality.

A search over the formats of devices around a planner: from each format for all of them, then one device after the other
as long as something is gained. What a format costs in quality is told by quality/weight_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from splitray.arch import ModelArch, held_by
from splitray.cost import CostModel
from splitray.errors import InputError, ModelError, PlacementError
from splitray.placement import Placement
from splitray.planners.checked import CheckedPlanner
from splitray.planners.drift_plus_penalty import DriftPlusPenalty, cost_of
from splitray.planners.exact import Exact
from splitray.planners.protocol import ClusterState
from splitray.quality.weight_loss import weights_loss
from splitray.weight_formats import FORMATS

_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedWeights:
    """Formats of all devices and what the best placement found with them costs; `short` says why there is none.

    `holders` are the devices that hold something.
    """

    weights: Mapping[str, str]
    holders: tuple[str, ...] = ()
    tpot_s: float = float("inf")
    energy_j_per_token: float = float("inf")
    accuracy_loss: float = float("inf")
    cost: float = float("inf")
    """What the planner minimises; of `exact` a token's seconds, a percent of perplexity counting as one of time."""
    short: str | None = None

    def document(self) -> dict[str, Any]:
        """As plain values, the formats of those that hold something; null for what is not finite."""
        figures = ("tpot_s", "energy_j_per_token", "accuracy_loss", "cost")
        found = {} if self.short else {f: getattr(self, f) for f in figures}
        return {"weights": self.held, **dict.fromkeys(figures), **found, "short": self.short}

    @property
    def held(self) -> dict[str, str]:
        """The formats of the devices that hold something; of all, where nothing fits."""
        return {d: w for d, w in self.weights.items() if d in self.holders or self.short}


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWeights:
    """What was chosen: the state with its formats, and a placement on it; `tried` begins with that."""

    state: ClusterState
    placement: Placement
    tried: tuple[TriedWeights, ...]


def best_weights(chosen: CheckedPlanner, state: ClusterState, *, sums: str = "fixed", lean: bool = True) -> BestWeights:
    """Choose the format of each device whose topology names none.

    `state.arch` has plain weights on those; devices that are no processor keep them.

    Raises:
        InputError: the planner has no price for perplexity.
        PlacementError: nothing fits in any format.
    """
    search = _Search(chosen, state, sums=sums, lean=lean)
    search.run()
    return search.found()


class _Search:
    def __init__(self, chosen: CheckedPlanner, state: ClusterState, *, sums: str, lean: bool) -> None:
        planner = chosen.planner
        prices_loss = isinstance(planner, DriftPlusPenalty) and planner.v > 0
        if not prices_loss and not isinstance(planner, Exact):
            raise InputError(
                "weights best",
                expected="the planner exact, or drift_plus_penalty:V with V above 0, which price perplexity",
                actual=chosen.spec,
                remedy="name a format, or use for example --planner drift_plus_penalty:10",
            )
        self._final, self._state = chosen, state
        # The program of drift_plus_penalty is quick; exact places once, with the formats that were found.
        self._planner = planner if isinstance(planner, DriftPlusPenalty) else DriftPlusPenalty()
        arch = state.arch
        self._held = {str(d): arch.on(d).weights for d in state.topology.ids}
        self._plain = replace(arch, weights="float32", device_weights=())
        self._free = [str(d.id) for d in state.topology.devices if d.weights is None and d.torch_device == "cpu"]
        self._arch_of: Callable[[Mapping[str, str]], ModelArch] = lambda w: held_by(
            self._plain, w, sums=sums, lean=lean
        )
        self._known: dict[tuple[str, ...], tuple[TriedWeights, ClusterState, Placement | None]] = {}

    def run(self) -> None:
        """Try what is worth it."""
        formats = [name for name in FORMATS if self._possible(name)]
        for name in formats:
            self._try({**self._held, **dict.fromkeys(self._free, name)})
        for _ in range(_TURNS):
            before = self._best()
            for device in self._free:
                for name in formats:
                    self._try({**self._best()[0].weights, device: name})
            if self._best()[0].cost >= before[0].cost:
                break

    def found(self) -> BestWeights:
        """The best of all.

        Raises:
            PlacementError: nothing fits.
        """
        tried, state, placement = self._best()
        if placement is None:
            smallest = min(self._known.values(), key=lambda each: self._model_bytes(each[1]))
            self._final.propose(smallest[1])  # says what is missing
            raise PlacementError("weights best", expected="a placement in some format", actual=tried.short,
                                 remedy="add memory or a device")  # fmt: skip
        if isinstance(self._final.planner, Exact):
            placement = self._final.propose(state)
        known = {tuple(tried.held.items()): tried}  # formats of devices that hold nothing make no difference
        for other in sorted((t for t, _, _ in self._known.values()), key=lambda t: t.cost):
            known.setdefault(tuple(other.held.items()), other)
        where = state.topology
        named = tuple(replace(d, weights=tried.weights[d.id]) for d in where.devices)
        state = replace(state, topology=replace(where, devices=named))
        return BestWeights(state=state, placement=placement, tried=tuple(known.values()))

    def _possible(self, name: str) -> bool:
        try:
            self._arch_of({**self._held, **dict.fromkeys(self._free, name)})
        except (InputError, ModelError):
            return False
        return True

    def _best(self) -> tuple[TriedWeights, ClusterState, Placement | None]:
        return min(self._known.values(), key=lambda each: each[0].cost)

    def _model_bytes(self, state: ClusterState) -> int:
        return min(state.arch.on(d).model_bytes for d in state.topology.ids)

    def _try(self, weights: Mapping[str, str]) -> None:
        key = tuple(weights[d] for d in self._held)
        if key in self._known:
            return
        state = replace(self._state, arch=self._arch_of(weights))
        checked = replace(self._final, planner=self._planner)
        try:
            placement = checked.propose(state)
        except PlacementError as error:
            self._known[key] = TriedWeights(weights=weights, short=str(error)), state, None
            return
        step = CostModel(state.arch, state.topology, codec=state.codec).decode(
            placement, context_tokens=max(1, state.context_tokens)
        )
        seconds, loss = float(step.cycle_s[0]), weights_loss(placement, state.arch)
        cost = seconds * (1 + loss)
        if self._planner.v:
            cost = cost_of(placement, state, self._planner.prices(state))
        joule = float(step.energy_j(state.topology).sum())
        tried = TriedWeights(
            weights=weights, holders=tuple(map(str, placement.devices)), tpot_s=seconds, energy_j_per_token=joule,
            accuracy_loss=loss, cost=cost,
        )  # fmt: skip
        self._known[key] = tried, state, placement
