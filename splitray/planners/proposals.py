"""What other planners propose, as starts and as rivals of a search: those placements that can be run as they are."""

from collections.abc import Iterable, Iterator

from splitray.errors import InputError
from splitray.fitted import fitted
from splitray.placement import Placement
from splitray.planners.memory import check
from splitray.planners.protocol import ClusterState, Planner
from splitray.route import compile_route


def proposals(planners: Iterable[Planner], state: ClusterState) -> Iterator[Placement]:
    """One placement of each planner that finds one."""
    for planner in planners:
        try:
            placement = fitted(planner.propose(state), state.arch)
        except InputError:
            continue
        if runs(placement, state):
            yield placement


def runs(placement: Placement, state: ClusterState) -> bool:
    """Whether a placement is valid, fits into memory and needs no missing link."""
    try:
        check(placement, state)
        compile_route(placement, state.arch, state.topology)
    except InputError:
        return False
    return True
