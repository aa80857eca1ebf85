"""The exact program under the knobs that a policy turns: the one way from knobs to placements.

An environment calls it for many instances, a serving planner for one, so they cannot disagree. Shapes: N instances,
G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.cost import Rates
from splitray.planners.protocol import RequestShape
from splitray.rl.grid.choice import Choice
from splitray.rl.grid.grid import Grid
from splitray.rl.world.action import MOVE_WEIGHTS, PRICES, V_FACTORS
from splitray.rl.world.cell import References
from splitray.rl.world.moving import s_per_byte
from splitray.rl.world.reward import Weights, price_per_joule
from splitray.sim.crowd import slowed

INTERVAL_TOKENS = 64  # over which a move must pay, as for the other planners


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What the program needs to know of N instances besides the knobs."""

    rates: Rates
    cloud_free: Floats  # [N]
    backlog_tokens: Floats
    arrived_tokens: Floats
    energy_debt_j: Floats
    longest_tokens: Floats
    memory_bytes: Floats  # [N, 2]
    slot_s: float
    current: Choice | None

    def take(self, rows: Ints) -> Moment:
        """A copy of the instances `rows`."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in _WHOLE}
        current = None if self.current is None else self.current.take(rows)
        return replace(self, **arrays, rates=self.rates.take(rows), current=current)


_WHOLE = ("rates", "slot_s", "current")


def planned(
    grid: Grid,
    moment: Moment,
    knobs: Ints,
    *,
    known: References,
    request: RequestShape,
    weights: Weights,
    allowed: Bools | None = None,
) -> Choice:
    """The cheapest placements of one slot under knobs [N, 3] (V, weight of moves, the cloud's price)."""
    m, idle_w = moment, sum(d.idle_w for d in grid.topology.devices)
    per_joule = np.array(V_FACTORS)[knobs[:, 0]] + m.energy_debt_j / known.request_j
    per_joule = per_joule * price_per_joule(weights, known)
    per_second = (1 + m.backlog_tokens + m.arrived_tokens / 2) / m.slot_s
    free = m.current is None
    return grid.plan(
        told(m.rates, m.cloud_free ** np.array(PRICES)[knobs[:, 2]]), context_tokens=m.longest_tokens,
        per_second=per_second + per_joule * idle_w, per_joule=per_joule, request=request,
        memory_bytes=m.memory_bytes, allowed=allowed, current=m.current,
        move_s_per_byte=None if free else s_per_byte(m.rates, m.cloud_free, known),
        move_weight=np.array(MOVE_WEIGHTS)[knobs[:, 1]] * per_second / INTERVAL_TOKENS,
    )  # fmt: skip


def told(rates: Rates, price: Floats) -> Rates:
    """The rates that the program is told: the cloud is slower by its price [N], at most 1.

    Who shares a cloud by turns gets 1 / (1 + n) of it beside n others, and adds up to n times its own time there to
    theirs (sim/crowd.py): an exponent of 1 charges all of that, 0 none.
    """
    if (price == 1).all():
        return rates
    return slowed(rates, np.stack([np.ones(len(price)), price], axis=1))
