"""Planners by name, and those that users bring: one table, and one function that makes a planner of what is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

from splitray.errors import PlacementError, did_you_mean
from splitray.planners.checked import CheckedPlanner
from splitray.planners.cut import BestCut, FixedCut
from splitray.planners.dealt import Greedy, RoundRobin
from splitray.planners.drift_plus_penalty import DriftPlusPenalty
from splitray.planners.exact import Exact
from splitray.planners.layer_dp import LayerDp
from splitray.planners.myopic import Myopic
from splitray.planners.myopic_search import MyopicSearch
from splitray.planners.outside import USAGE, given, imported
from splitray.planners.protocol import ClusterState, Freedom, Planner
from splitray.planners.random import RandomPlanner
from splitray.planners.scored import VARIANTS
from splitray.planners.shares import Even, Proportional, TensorParallel
from splitray.planners.ucb import Ucb
from splitray.planners.whole import BestDevice, CloudOnly, CloudOnlyRtt, EdgeOnly

__all__ = ["PLANNER_USAGES", "CheckedPlanner", "ClusterState", "Planner", "make_planner"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a name is written and built from its argument (empty if it takes none) and the seed, and what it may do."""

    usage: str
    build: Callable[[str, int], Planner]
    space: Freedom = "all"
    once: bool = False
    heeds_queues: bool = False
    charges_moves: bool = False

    @property
    def argument(self) -> Literal["none", "needed", "optional"]:
        return "none" if ":" not in self.usage else "optional" if "[" in self.usage else "needed"


def _refused(name: str, expected: str, given: str, remedy: str) -> PlacementError:
    return PlacementError(f"planner {name}".strip(), expected=expected, actual=repr(given), remedy=remedy)


def _fixed_cut(argument: str, _: int) -> Planner:
    if not argument.isdecimal():
        expected = "P, the number of layers on the edge, as a whole number of 0 or more"
        raise _refused("fixed_cut:P", expected, argument, "write for example fixed_cut:6")
    return FixedCut(int(argument))


def _variant(name: str, variants: Mapping[str, Planner]) -> Callable[[str, int], Planner]:
    """Of a planner with variants by name; the one without a name is the empty text's."""
    named = [v for v in variants if v not in ("", "paper")]

    def build(argument: str, _: int) -> Planner:
        if argument in variants:
            return variants[argument]
        expected = f"{name}, {name}:paper" + (f", or {name}:VARIANT with one of {', '.join(named)}" if named else "")
        raise _refused(name, expected, argument, f"write one of them{did_you_mean(argument, [*named, 'paper'])}")

    return build


def _drift_plus_penalty(argument: str, _: int) -> Planner:
    try:
        v = float(argument or 0)
    except ValueError:
        v = float("nan")
    if not 0 <= v < float("inf"):
        expected = "drift_plus_penalty, or drift_plus_penalty:V with V a number of 0 or more"
        raise _refused("drift_plus_penalty", expected, argument, "write for example drift_plus_penalty:10")
    return DriftPlusPenalty(v)


def _exact(argument: str, _: int) -> Planner:
    try:
        return Exact(float(argument) if argument else None)
    except ValueError as error:
        expected = "exact, or exact:SECONDS to end with the best that is found by then"
        raise _refused("exact", expected, argument, "write for example exact:20") from error


def _splitwise(argument: str, _: int) -> Planner:
    # By name, for the learned policy stands on planners and the simulator, and not the other way round.
    return import_module("splitray.rl.policy_planner").build(argument)


_STATIC_CUTS = {"": BestCut(static=True), "paper": BestCut(static=True, paper=True)}
_LAYER_CUTS = {"": BestCut(), "paper": BestCut(paper=True)}
_LAYER_DPS = {
    "": LayerDp(), "throughput": LayerDp(throughput=True), "paper": LayerDp(paper=True),
    "paper_throughput": LayerDp(throughput=True, paper=True),
}  # fmt: skip
_TENSOR_PARALLELS: dict[str, Planner] = {"": TensorParallel(), "paper": Proportional(priced=True)}
_MYOPICS: dict[str, Planner] = {"": MyopicSearch(), "paper": Myopic(), **VARIANTS}
_PLANNERS = {
    "edge_only": _Entry("edge_only", lambda _, __: EdgeOnly(), "one_device"),
    "cloud_only": _Entry("cloud_only", lambda _, __: CloudOnly(), "one_device"),
    "cloud_only_rtt": _Entry("cloud_only_rtt", lambda _, __: CloudOnlyRtt(), "layers"),
    "best_device": _Entry("best_device", lambda _, __: BestDevice(), "one_device"),
    "even": _Entry("even", lambda _, __: Even(), once=True),
    "proportional": _Entry("proportional", lambda _, __: Proportional(), once=True),
    "fixed_cut": _Entry("fixed_cut:P", _fixed_cut, "layers", once=True),
    "round_robin": _Entry("round_robin", lambda _, __: RoundRobin(), once=True),
    "greedy": _Entry("greedy", lambda _, __: Greedy(), "layers"),
    "static_cut": _Entry("static_cut[:paper]", _variant("static_cut", _STATIC_CUTS), "layers", once=True),
    "layer_cut": _Entry("layer_cut[:paper]", _variant("layer_cut", _LAYER_CUTS), "layers"),
    "layer_dp": _Entry("layer_dp[:throughput|paper|paper_throughput]", _variant("layer_dp", _LAYER_DPS), "layers"),
    "tensor_parallel": _Entry("tensor_parallel[:paper]", _variant("tensor_parallel", _TENSOR_PARALLELS)),
    "exact": _Entry("exact[:SECONDS]", _exact),
    "drift_plus_penalty": _Entry("drift_plus_penalty[:V]", _drift_plus_penalty, heeds_queues=True, charges_moves=True),
    "myopic": _Entry("myopic[:paper|as_coded|max|weighted]", _variant("myopic", _MYOPICS), "heads", charges_moves=True),
    "ucb": _Entry("ucb", lambda _, __: Ucb(), "one_device", heeds_queues=True, charges_moves=True),
    "splitwise": _Entry("splitwise[:PATH]", _splitwise, heeds_queues=True, charges_moves=True),
    "random": _Entry("random", lambda _, seed: RandomPlanner(np.random.default_rng(seed)), once=True),
}
PLANNER_USAGES = tuple(entry.usage for entry in _PLANNERS.values())


def make_planner(planner: str | Planner | None, *, seed: int = 0) -> CheckedPlanner:
    """The planner that a caller gave, as text or as an object.

    Args:
        planner: one of `PLANNER_USAGES`, or `module:Class[:ARG]` of a module that the working directory or the
            installation has (a known name comes first), or an object with `propose(ClusterState) -> Placement`;
            None is `even`.
        seed: of the known planners that draw; the same seed gives the same sequence of proposals.

    Raises:
        PlacementError: the name is unknown, its argument is missing, wrong or not wanted, or a planner from outside
            cannot be imported, built or used.
    """
    planner = "even" if planner is None else planner
    if not isinstance(planner, str):
        return given(planner)
    name, colon, argument = planner.partition(":")
    entry = _PLANNERS.get(name)
    if entry is None:
        meant = did_you_mean(name, _PLANNERS)
        if colon:
            return imported(planner, meant)
        raise _refused("", f"one of {', '.join(PLANNER_USAGES)}, or {USAGE}", planner, f"correct the name{meant}")
    missing_or_unwanted = {"none": bool(colon), "needed": not colon, "optional": False}[entry.argument]
    if bool(colon) != bool(argument) or missing_or_unwanted:
        hidden = f", or rename {name}.py, as known names come first" if Path(f"{name}.py").is_file() else ""
        expected = entry.usage + (" without an argument" if entry.argument == "none" else "")
        raise _refused(name, expected, planner, f"write {entry.usage}{hidden}")
    made = entry.build(argument, seed)
    space = getattr(made, "space", entry.space)  # variants of one name differ in it
    most = getattr(made, "most_devices", None)
    return CheckedPlanner(planner, made, space, entry.once, entry.heeds_queues, entry.charges_moves, most)
