"""PerLLM: which server takes the model, learnt by an upper confidence bound under constraints (arXiv 2405.14636).

The abstract names a constraint-satisfying UCB; arms, reward and bound are INFERRED: UCB1 on the cost of each device
that can hold the whole model, relative to the dearest seen.
"""

from dataclasses import dataclass, field

import numpy as np

from splitray.placement import Placement
from splitray.planners.memory import no_room, shortfall
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import whole_on
from splitray.topology import DeviceId


@dataclass(slots=True)
class Ucb:
    """The whole model on one device; each interval tries the device that may well be the best.

    Args:
        exploration: weight of the bound; 2 is UCB1's.
        energy_weight: seconds that a joule counts for.
    """

    exploration: float = 2.0
    energy_weight: float = 0.0
    _costs: dict[DeviceId, list[float]] = field(default_factory=dict)

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no single device has room."""
        arms = {d: p for d in state.topology.ids if not shortfall(p := whole_on(d, state), state)}
        if not arms:
            remedy = "use a planner that splits (layer_dp, proportional)"
            expected = f"a device that holds all of {state.arch.name}"
            raise no_room(expected, "none with room for its weights and KV", remedy)
        untried = [d for d in arms if d not in self._costs]
        if untried:
            return arms[untried[0]]
        worst = max(max(self._costs[d]) for d in arms) or 1.0
        tries = sum(len(self._costs[d]) for d in arms)

        def bound(device: DeviceId) -> float:
            costs = self._costs[device]
            spread = np.sqrt(self.exploration * np.log(tries) / len(costs))
            return float(1 - np.mean(costs) / worst + spread)

        return arms[max(arms, key=bound)]

    def observe(self, state: ClusterState, placement: Placement, *, tpot_s: float, energy_j_per_token: float) -> None:
        """See `Learner`; an outage counts ten times the worst cost seen."""
        device = placement.layers[0].attention.devices[0]
        cost = tpot_s + self.energy_weight * energy_j_per_token
        seen = [c for costs in self._costs.values() for c in costs]
        self._costs.setdefault(device, []).append(cost if np.isfinite(cost) else 10 * max(seen, default=1.0))
