"""What is to be done next about devices that are gone or back: from what is wanted and what is seen. Pure.

It is asked when a fault has stopped the run, and again and again beside it; carrying out is `recovery` and `returns`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from splitray.errors import DeviceLost, InputError
from splitray.placement import Placement
from splitray.runtime.engine.policy import without
from splitray.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedState:
    """What is to run.

    Args:
        placement: while all devices are there.
        topology: all devices, whether they are there or not.
        place: the placement on some of them, or None if there is to be no other; raises InputError or DeviceLost where
            nothing fits.
        fail_back: whether devices that were left out get pieces again.
    """

    placement: Placement
    topology: Topology
    place: Callable[[Topology], Placement] | None
    fail_back: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenState:
    """What there is.

    Args:
        placement: the one that runs.
        topology: the devices over which it was planned.
        usable: devices that live, are reached, and have the same weights.
        stopped: whether a fault has stopped the run.
        patient: whether those that are missing may answer again soon.
        moving: whether another placement is on its way.
    """

    placement: Placement
    topology: Topology
    usable: frozenset[str]
    stopped: bool = False
    patient: bool = False
    moving: bool = False


@dataclass(frozen=True, slots=True)
class NextStep:
    """`stay` as it is, `wait` for devices, `go_on` with a placement now, or `move` to one beside the run."""

    kind: Literal["stay", "wait", "go_on", "move"]
    why: str
    placement: Placement
    topology: Topology


def next_step(wanted: WantedState, seen: SeenState) -> NextStep:
    """What to do. Every device of a placement that it gives is usable."""

    def stay(why: str, kind: Literal["stay", "wait"] = "stay") -> NextStep:
        return NextStep(kind, why, seen.placement, seen.topology)

    if seen.stopped:
        missing = _missing(seen.placement, seen.topology, seen.usable)
        if not missing:
            return NextStep("go_on", "all devices of the placement are there", seen.placement, seen.topology)
        if wanted.place is None or seen.patient:
            return stay(f"{', '.join(missing)} cannot be reached", "wait")
        kind: Literal["go_on", "move"] = "go_on"
    else:
        if seen.moving:
            return stay("a move is under way")
        if not wanted.fail_back or _same(wanted, seen):
            return stay("all is as it should be")
        kind = "move"
    if not _missing(wanted.placement, wanted.topology, seen.usable):
        return NextStep(kind, "all devices are there", wanted.placement, wanted.topology)
    ids = {str(d) for d in wanted.topology.ids}
    out = ids - seen.usable
    back = ids & seen.usable - {str(d) for d in seen.topology.ids}
    if kind == "move" and not back:
        return stay("nobody has come back")
    if wanted.place is None:
        return stay("there is to be no other placement")
    try:
        left = without(wanted.topology, out)
        placement = wanted.place(left)
    except (InputError, DeviceLost) as error:
        return stay(f"{_less(out)}there is no placement: {error}", "wait" if seen.stopped else "stay")
    if missing := _missing(placement, left, seen.usable):
        return stay(f"the planner wants {', '.join(missing)}, which is not there", "wait" if seen.stopped else "stay")
    if kind == "move" and placement == seen.placement:
        return stay("who has come back is not needed")
    return NextStep(kind, f"{_less(out)}the planner has this", placement, left)


def _less(out: set[str]) -> str:
    return f"without {', '.join(sorted(out))} " if out else ""


def _missing(placement: Placement, topology: Topology, usable: frozenset[str]) -> list[str]:
    return sorted({str(d) for d in (topology.origin, *placement.devices)} - usable)


def _same(wanted: WantedState, seen: SeenState) -> bool:
    ours, theirs = seen.topology, wanted.topology
    return seen.placement == wanted.placement and (ours.origin, {*ours.ids}) == (theirs.origin, {*theirs.ids})
