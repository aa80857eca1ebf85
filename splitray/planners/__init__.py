"""Planners by name: one protocol, one table, every proposal checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitray.errors import PlacementError, did_you_mean
from splitray.placement import Placement
from splitray.planners.cut import FixedCut
from splitray.planners.memory import check
from splitray.planners.protocol import ClusterState, Planner
from splitray.planners.random import RandomPlanner
from splitray.planners.shares import Even, Proportional
from splitray.planners.whole import BestDevice, CloudOnly, EdgeOnly

__all__ = ["PLANNER_USAGES", "CheckedPlanner", "ClusterState", "Planner", "make_planner"]


@dataclass(frozen=True, slots=True)
class CheckedPlanner:
    """A planner whose every proposal has passed `validate` and leaves room for the KV cache."""

    spec: str
    planner: Planner

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`."""
        placement = self.planner.propose(state)
        check(placement, state)
        return placement


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a name is written and built from its argument (empty if it takes none) and the seed."""

    usage: str
    build: Callable[[str, int], Planner]

    @property
    def takes_argument(self) -> bool:
        return ":" in self.usage


def _fixed_cut(argument: str, _: int) -> Planner:
    if not argument.isdecimal():
        raise PlacementError(
            "planner fixed_cut:P",
            expected="P, the number of layers on the edge, as a whole number of 0 or more",
            actual=repr(argument),
            remedy="write for example fixed_cut:6",
        )
    return FixedCut(int(argument))


_PLANNERS = {
    "edge_only": _Entry("edge_only", lambda _, __: EdgeOnly()),
    "cloud_only": _Entry("cloud_only", lambda _, __: CloudOnly()),
    "best_device": _Entry("best_device", lambda _, __: BestDevice()),
    "even": _Entry("even", lambda _, __: Even()),
    "proportional": _Entry("proportional", lambda _, __: Proportional()),
    "fixed_cut": _Entry("fixed_cut:P", _fixed_cut),
    "random": _Entry("random", lambda _, seed: RandomPlanner(np.random.default_rng(seed))),
}
PLANNER_USAGES = tuple(entry.usage for entry in _PLANNERS.values())


def make_planner(spec: str, *, seed: int = 0) -> CheckedPlanner:
    """Build the planner that `NAME` or `NAME:ARG` names.

    Args:
        spec: one of `PLANNER_USAGES`.
        seed: of the planners that draw; the same seed gives the same sequence of proposals.

    Raises:
        PlacementError: the name is unknown, or its argument is missing, wrong or not wanted.
    """
    name, colon, argument = spec.partition(":")
    entry = _PLANNERS.get(name)
    if entry is None:
        raise PlacementError(
            "planner",
            expected=f"one of {', '.join(PLANNER_USAGES)}",
            actual=repr(spec),
            remedy=f"correct the name{did_you_mean(name, _PLANNERS)}",
        )
    if bool(colon) != entry.takes_argument or bool(argument) != entry.takes_argument:
        raise PlacementError(
            f"planner {name}",
            expected=entry.usage + ("" if entry.takes_argument else " without an argument"),
            actual=repr(spec),
            remedy=f"write {entry.usage}",
        )
    return CheckedPlanner(spec, entry.build(argument, seed))
