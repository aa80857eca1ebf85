"""Ours: the placement of the least time a token that we can find, with a proven bound on what is left to gain.

Four steps over one set of tables (optimum/space.py): an additive dynamic program says which holdings are worth trying
and what scarce memory is worth, a beam with the true clocks builds placements from them, a local search improves these
and those of other planners, and potentials bound every placement from below. Small instances are also solved by
enumeration and by a mixed-integer program (optimum/enumerate.py), against which tests hold the others.

Placements that are equally quick within rounding differ in what they cost the edge: the one of less energy is taken.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb, prod

import numpy as np

from splitray.cost import CostModel
from splitray.errors import PlacementError, listed
from splitray.fitted import fitted
from splitray.placement import Placement
from splitray.planners.cut import BestCut
from splitray.planners.layer_dp import LayerDp
from splitray.planners.memory import model_bytes, no_room
from splitray.planners.myopic import Myopic
from splitray.planners.myopic_search import MyopicSearch
from splitray.planners.optimum.additive import Additive, Chosen, Prices
from splitray.planners.optimum.bound import Potentials
from splitray.planners.optimum.deadline import NEVER, Deadline, OutOfTime
from splitray.planners.optimum.enumerate import Found, Step, by_counts
from splitray.planners.optimum.floor import floor_s
from splitray.planners.optimum.improve import LocalSearch
from splitray.planners.optimum.scarce import priced
from splitray.planners.optimum.search import beam
from splitray.planners.optimum.space import Kind, Space
from splitray.planners.proposals import proposals, runs
from splitray.planners.protocol import EQUAL, ClusterState, Freedom, Planner, equal_s_per_joule
from splitray.planners.shares import TensorParallel
from splitray.planners.whole import BestDevice

_GUIDED = 3  # searches along the bound's own path
_TRIED = 10  # holdings of each kind that the beam may use
_PROMISING = 6  # and the local search
_WIDTH = 8
_ENDS = 2  # devices of the embedding that the beam tries
_MOST_WAYS = 600  # to do all sub-blocks, which are then enumerated
_STARTS, _CHANGES, _GAIN = 3, 60, 1e-5  # of the local search
PROVEN = 1e-6  # a gap below this counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactResult:
    """`tpot_s` of the placement by the cost model, and what no placement of the space goes below.

    The bound is over the whole of `space`; for `all` that is every placement that the engine can execute. Where the
    search looked at a part of it, at few of many devices (`Space.part`) or `MOST_SHARED` that share sub-blocks, or had
    no time, the bound is that of `floor_s`, which knows all devices. `proven`: nothing is left between the two.
    """

    placement: Placement
    tpot_s: float
    lower_bound_s: float
    proven: bool
    decision_s: float


@dataclass(frozen=True, slots=True)
class Exact:
    """The best placement found for the state's context, within `limit_s` if there is one; migration is not charged."""

    limit_s: float | None = None

    def __post_init__(self) -> None:
        Deadline.within(self.limit_s)  # refuses what is none

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where nothing fits into memory."""
        return solve(state, deadline=Deadline.within(self.limit_s)).placement


def solve(
    state: ClusterState,
    space: Freedom = "all",
    *,
    blocks: int | None = None,
    known: Sequence[Placement] = (),
    deadline: Deadline = NEVER,
) -> ExactResult:
    """The best placement of an action space and a bound on the optimum.

    `space` and `blocks` are those of `Space`; `known` are valid placements of other planners, which the result is to be
    no worse than. After the `deadline` it is the best that was found until then.

    Raises:
        PlacementError: no placement found that fits; says what is needed and available.
    """
    started = time.perf_counter()
    part = Space.part(state)
    search = _SpaceSearch(Space(part, space, blocks=blocks, deadline=deadline), state)
    search.offer(known)
    bound, late = -np.inf, False
    try:
        bound = search.enumerate() if space == "one_device" or _is_small(search.space) else search.run()
    except OutOfTime:
        bound, late = search.potentials.so_far_s if search.potentials is not None else -np.inf, True
    if search.best is None:
        raise _too_late(state) if late else too_small(search.space)
    tpot_s, placement = search.best
    shared = len(search.space.shared) if space in ("heads", "all") else len(part.topology.ids)
    if len(state.topology.ids) > shared and space != "one_device":
        bound = -np.inf  # of the devices and sets of them that the search looked at
    bound = max(bound, floor_s(state))
    return ExactResult(
        placement=placement,
        tpot_s=tpot_s,
        lower_bound_s=min(bound, tpot_s),
        proven=tpot_s <= bound * (1 + PROVEN),
        decision_s=time.perf_counter() - started,
    )


def _too_late(state: ClusterState) -> PlacementError:
    expected = f"time enough to find a placement of {state.arch.name}"
    return PlacementError("exact", expected=expected, actual="none until the limit", remedy="raise --limit-s")


def _is_small(space: Space) -> bool:
    """Whether counting every way to do every sub-block takes a moment."""
    ways = [prod(comb(p.count + space.num_devices, space.num_devices) for p in space.pieces(k)) for k in space.kinds]
    return sum(ways) <= _MOST_WAYS


class _SpaceSearch:
    """Collects placements of one space and keeps the quickest that fits; of many devices the space may know a part."""

    def __init__(self, space: Space, state: ClusterState | None = None) -> None:
        self.space, self.state = space, state or space.state
        self.best: tuple[float, Placement] | None = None
        self._cost = CostModel(self.state.arch, self.state.topology, codec=self.state.codec)
        self._known: dict[Placement, tuple[float, float]] = {}  # seconds, and joule of the edge
        self._improved: set[Placement] = set()
        self._near: list[int] = []  # holdings of the cheapest paths of the additive programs
        self._price = np.zeros(space.num_devices)  # of memory, seconds a byte
        self.potentials: Potentials | None = None

    def offer(self, placements: Iterable[Placement]) -> None:
        """Keep the quickest, and of equally quick ones the one that costs the edge less energy."""
        edge = [d.tier == "edge" for d in self.state.topology.devices]
        for proposed in placements:
            placement = fitted(proposed, self.state.arch)
            if placement in self._known or (placement is not proposed and not runs(placement, self.state)):
                continue
            step = self._cost.decode(placement, context_tokens=max(1, self.state.context_tokens))
            joule = float(step.energy_j(self.state.topology)[0, edge].sum())
            self._known[placement] = float(step.cycle_s[0]), joule
            quickest = min(seconds for seconds, _ in self._known.values())
            equal = (p for p, (seconds, _) in self._known.items() if seconds <= quickest * (1 + EQUAL))
            self.best = min(((self._known[p][0], p) for p in equal), key=lambda each: self._known[each[1]][1])

    def _offer(self, found: Found | None) -> None:
        if found is not None and (self.best is None or found.tpot_s <= self.best[0] * (1 + EQUAL)):
            self.offer([self.space.placement(found.path, found.embedding)])

    def enumerate(self) -> float:
        """The optimum of a small space, which bounds itself."""
        if self.space.freedom == "one_device":
            self.offer(proposals([BestDevice()], replace(self.state, current=None)))
            return self.best[0] if self.best is not None else np.inf
        found = by_counts(self.space)
        self._offer(found)
        return np.inf if found is None else found.tpot_s

    def run(self) -> float:
        """Search, let the bound's own path say what else to try, and return the bound."""
        space = self.space
        for placement in simple(space, self.state, [MyopicSearch(deadline=space.deadline)]):
            self.offer([placement])
            space.deadline.check()
        programs = self._additive()
        for program in programs:
            holdings, ends = program.near_best(_TRIED)
            self._near += [h for each in holdings.values() for h in each[:_PROMISING]]
            first, second = [h[:4] for h in holdings.values()][:2]
            near = [(a, f) for a in first for f in second] if len(holdings) > 2 else []
            self._beam(holdings, near, ends[:_ENDS])
        if self.best is None:
            alone = [e for e in space.embeddings if len(space.tables[e].devices) == 1]
            self._offer(beam(space, width=2, price_s_per_byte=self._price, embeddings=alone))
        if self.best is None:
            return np.inf
        self._improve()
        self.potentials = potentials = Potentials(space, self.best[0])
        tried: set[tuple[int, int]] = set()
        for _ in range(_GUIDED):
            bound = potentials.lower_bound_s(self._price)
            pairs = [p for p in potentials.weakest[:3] if p not in tried]
            if bound * (1 + PROVEN) >= self.best[0] or not pairs:
                break
            tried.update(pairs)
            few, ends = programs[-1].near_best(4)
            added = dict(zip(space.kinds[:2], zip(*pairs, strict=True), strict=False))
            self._beam({k: [*dict.fromkeys([*added.get(k, ()), *few[k]])] for k in few}, pairs, ends[:_ENDS])
            self._improve()
        return potentials.climb_s(self._price, self.best[0])

    def _improve(self) -> None:
        """Search around the quickest that were found, each once."""
        order = sorted(self._known, key=lambda placement: self._known[placement][0])
        for placement in order[:_STARTS]:
            if placement in self._improved:
                continue
            self._improved.add(placement)
            path = self.space.path_of(placement)
            if path is not None:
                start = Found(tpot_s=self._known[placement][0], path=path[0], embedding=path[1])
                better = LocalSearch(self.space, start, self._promising(path[0])).run(_CHANGES, _GAIN)
                self.offer([self.space.placement(better.path, better.embedding)])

    def _promising(self, path: Sequence[Step]) -> list[int]:
        """Holdings for the local search: those of the path, each device alone, and those near the program's best."""
        alone = [h for h, each in enumerate(self.space.holdings) if len(each.devices) == 1]
        return [*dict.fromkeys([*(h for h, _ in path), *alone, *self._near])]

    def _additive(self) -> list[Additive]:
        """The additive program without and, where memory binds, with a price of memory; offers what they choose."""
        prices = Prices(per_edge_joule=equal_s_per_joule(self.space.topology))
        free = Additive(self.space, prices)
        chosen = free.best()
        programs = [free]
        if (fits := _true(self.space, chosen)) is not None:
            self._offer(fits)
            return programs
        most = 0.0
        for program, each, price in priced(
            self.space, chosen, Prices(per_edge_joule=equal_s_per_joule(self.space.topology))
        ):
            self._offer(_true(self.space, each))
            bound = each.cost - float(price @ self.space.memory_bytes)
            if bound > most:  # the price under which the program says most about the memory that there is
                most, programs[1:], self._price = bound, [program], price
        return programs

    def _beam(
        self, holdings: Mapping[Kind, Sequence[int]], pairs: Sequence[tuple[int, int]], embeddings: Sequence[int]
    ) -> None:
        self._offer(
            beam(
                self.space,
                width=_WIDTH,
                holdings=holdings,
                pairs=pairs,
                embeddings=embeddings,
                price_s_per_byte=self._price,
            )
        )


def simple(space: Space, state: ClusterState | None = None, also: Sequence[Planner] = ()) -> Iterator[Placement]:
    """What other planners find in this space, so that ours is never behind them; those that fit.

    `state`: of all devices, where the space knows a part of them; `also`: further planners where all may be chosen.
    """
    kinds: list[Planner] = [BestDevice()]
    if space.freedom != "one_device":
        kinds += [BestCut(), LayerDp()]
    if space.freedom in ("heads", "all"):
        kinds.append(Myopic())
    if space.freedom == "all" and not space.coarse:
        kinds += [TensorParallel(), *also]
    state = replace(state or space.state, current=None)
    return proposals(kinds, state)


def _true(space: Space, chosen: Chosen) -> Found | None:
    """The path with its true clocks, None where it does not fit or needs a missing link."""
    if not chosen.fits(space):
        return None
    seconds = space.seconds(chosen.path, chosen.embedding)
    return Found(tpot_s=seconds, path=chosen.path, embedding=chosen.embedding)


def too_small(space: Space) -> PlacementError:
    """What to say where no placement fits: how much is needed and available, or which devices cannot talk."""
    state = space.state
    available = listed([f"{d.memory_bytes:,.0f} on {d.id}" for d in state.topology.devices])
    needed, total = model_bytes(state), float(space.memory_bytes.sum())
    apart = [pair for pair in combinations(state.topology.ids, 2) if not space.linked(*pair)]
    if needed > total:
        short = f"{needed - total:,.0f} bytes too many"
    elif apart:
        short = f"which devices without a link cannot share ({listed([f'{a} and {b}' for a, b in apart])})"
    else:
        short = "no way found to deal its pieces out"
    expected = f"room for {state.arch.name} with {state.context_tokens} tokens on linked devices ({available})"
    return no_room(expected, f"a need of {needed:,} bytes, {short}", "add memory or a link, or shorten the context")
