"""Ours: the placement of the least time a token that we can find, with a proven bound on what is left to gain.

Three steps over one set of tables (optimum/space.py): an additive dynamic program says which holdings are worth
trying and what scarce memory is worth, a beam with the true clocks builds placements from them, and potentials bound
every placement from below. Small instances are also solved by enumeration and by a mixed-integer program
(optimum/enumerate.py), against which tests hold the three.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from splitray.cost import CostModel
from splitray.errors import InputError, PlacementError
from splitray.placement import Placement
from splitray.planners.cut import BestCut
from splitray.planners.layer_dp import LayerDp
from splitray.planners.memory import check, model_bytes
from splitray.planners.myopic import Myopic
from splitray.planners.optimum.additive import Additive, Chosen, Prices
from splitray.planners.optimum.bound import Potentials
from splitray.planners.optimum.enumerate import Found
from splitray.planners.optimum.search import beam
from splitray.planners.optimum.space import MISSING_S, Floats, Freedom, Space
from splitray.planners.protocol import ClusterState, Planner
from splitray.planners.shares import Proportional
from splitray.planners.whole import BestDevice
from splitray.route import compile_route

_ROUNDS = 40  # of pricing memory
_TRIED = 10  # holdings of each kind that the beam may use
_WIDTH = 8
_ENDS = 2  # devices of the embedding that the beam tries
PROVEN = 1e-6  # a gap below this counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactResult:
    """`tpot_s` of the placement by the cost model, and what no placement of the space goes below.

    `lower_bound_s` is None where the space was cut down to `MOST_SHARED` devices that share sub-blocks, since it then
    bounds the smaller space only. `proven`: nothing is left between the two.
    """

    placement: Placement
    tpot_s: float
    lower_bound_s: float | None
    proven: bool
    decision_s: float


@dataclass(frozen=True, slots=True)
class Exact:
    """The best placement found for the state's context; migration is not charged."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where nothing fits into memory."""
        return _search(Space(state))[0]


def solve(state: ClusterState, space: Freedom = "all") -> ExactResult:
    """The best placement of an action space and a bound on the optimum.

    Args:
        state: arch, topology and context.
        space: see `Space`.

    Raises:
        PlacementError: no placement found that fits; says what is needed and available.
    """
    started = time.perf_counter()
    tables = Space(state, space)
    placement, tpot_s, price = _search(tables)
    bound = _bound(tables, price, tpot_s)
    cut_down = len(tables.topology.ids) > len(tables.shared) and space in ("heads", "all")
    return ExactResult(
        placement=placement,
        tpot_s=tpot_s,
        lower_bound_s=None if cut_down else bound,
        proven=not cut_down and tpot_s <= bound * (1 + PROVEN),
        decision_s=time.perf_counter() - started,
    )


def _search(space: Space) -> tuple[Placement, float, Floats]:
    """The best placement found, its time, and the price of memory under which it was."""
    free = Additive(space, Prices())
    chosen = free.best()
    found = [_true(space, chosen)]
    price = np.zeros(space.num_devices)
    programs = [free]
    if found[0] is None:
        for program, each, paid in priced(space, chosen, Prices()):
            programs, price = [free, program], paid
            found.append(_true(space, each))
    for program in programs:
        holdings, ends = program.near_best(_TRIED)
        found.append(beam(space, width=_WIDTH, holdings=holdings, embeddings=ends[:_ENDS], price_s_per_byte=price))
    built = [(f.tpot_s, space.placement(f.path, f.embedding)) for f in found if f is not None]
    built += [(seconds, p) for p in simple(space) for seconds in [_seconds(space, p)]]
    if not built and (last := beam(space, width=2, price_s_per_byte=price)) is not None:
        built = [(last.tpot_s, space.placement(last.path, last.embedding))]
    if not built:
        raise _too_small(space)
    best_s, placement = min(built, key=lambda item: item[0])
    return placement, best_s, price


def simple(space: Space) -> Iterator[Placement]:
    """What the papers' planners find in this space, so that ours is never behind them; those that fit."""
    kinds: list[Planner] = [BestDevice()]
    if space.freedom != "one_device":
        kinds += [BestCut(), LayerDp()]
    if space.freedom in ("heads", "all"):
        kinds.append(Myopic())
    if space.freedom == "all":
        kinds.append(Proportional(priced=True))
    state = replace(space.state, current=None)
    for planner in kinds:
        try:
            placement = planner.propose(state)
            check(placement, state)
            compile_route(placement, state.arch, state.topology)
        except InputError:
            continue
        yield placement


def _seconds(space: Space, placement: Placement) -> float:
    state = space.state
    cost = CostModel(state.arch, state.topology, codec=state.codec)
    return cost.tpot_s(placement, context_tokens=max(1, state.context_tokens))


def priced(space: Space, chosen: Chosen, prices: Prices) -> Iterator[tuple[Additive, Chosen, Floats]]:
    """Raise the price of memory where too much is held, and lower it where there is room (a subgradient method)."""
    price = np.zeros(space.num_devices)
    capacity = space.memory_bytes
    for turn in range(_ROUNDS):
        over = chosen.held_bytes - capacity
        step = 0.5 * chosen.cost / (1 + turn) ** 0.7 / max(float(over @ over), 1.0)
        price = np.maximum(0.0, price + step * over)
        program = Additive(space, replace(prices, per_byte=price))
        chosen = program.best()
        if not np.isfinite(chosen.cost):
            return
        yield program, chosen, price


def _true(space: Space, chosen: Chosen) -> Found | None:
    """The path with its true clocks, None where it does not fit or needs a missing link."""
    if (chosen.held_bytes > space.memory_bytes).any() or chosen.seconds > MISSING_S / 2:
        return None
    seconds = space.seconds(chosen.path, chosen.embedding)
    return Found(tpot_s=seconds, path=chosen.path, embedding=chosen.embedding)


def _bound(space: Space, price: Floats, upper: float) -> float:
    potentials = Potentials(space)
    best = potentials.lower_bound_s()
    if price.any() and best < upper * (1 - PROVEN):
        scale, stride = 1.0, 0.5
        value = potentials.lower_bound_s(price)
        for _ in range(12):  # the bound is concave in the price: climb along its direction
            higher, lower = scale * (1 + stride), scale / (1 + stride)
            tried = {s: potentials.lower_bound_s(s * price) for s in (higher, lower)}
            top = max(tried, key=lambda s: tried[s])
            if tried[top] > value:
                scale, value = top, tried[top]
            else:
                stride /= 2
        best = max(best, value)
    return min(best, upper)


def _too_small(space: Space) -> PlacementError:
    state = space.state
    available = ", ".join(f"{d.memory_bytes:,.0f} on {d.id}" for d in state.topology.devices)
    needed, total = model_bytes(state), float(space.memory_bytes.sum())
    short = f"{needed - total:,.0f} bytes too many" if needed > total else "no way found to deal its pieces out"
    return PlacementError(
        "memory",
        expected=f"room for {state.arch.name} with {state.context_tokens} tokens on linked devices ({available})",
        actual=f"a need of {needed:,} bytes, {short}",
        remedy="add memory or a link, or shorten the context",
    )
