"""A planner as the executors see it: every proposal checked, and what it says of itself. Knows no planner by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from splitray.errors import InputError, PlacementError, PlannerError
from splitray.fitted import fitted
from splitray.placement import Placement
from splitray.planners.memory import check, shortfall
from splitray.planners.protocol import ClusterState, Freedom, Learner, Planner
from splitray.weight_formats import NUM_BLOCKS


@dataclass(frozen=True, slots=True)
class CheckedPlanner:
    """A planner whose every proposal has passed `validate` and leaves room for the KV cache.

    `spec` is its name in reports; `space`, `once`, `heeds_queues`, `charges_moves` and `most_devices` are explained in
    `Planner`.
    `outside`: it is a user's own, so that whatever goes wrong in it is told as a fault of that planner.
    """

    spec: str
    planner: Planner
    space: Freedom = "all"
    once: bool = False
    heeds_queues: bool = False
    charges_moves: bool = False
    most_devices: int | None = None
    outside: bool = False

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`.

        Raises:
            PlacementError: the planner finds no placement, or the one that it proposes is not valid, or it takes fewer
                devices than there are.
            PlannerError: the planner comes from outside and raised something else, or proposed no `Placement`.
        """
        num_devices = len(state.topology.ids)
        if self.most_devices is not None and num_devices > self.most_devices:
            raise PlacementError(
                f"planner {self.spec}",
                expected=f"at most {self.most_devices:,} devices",
                actual=f"{num_devices:,} in the topology",
                remedy="use one that takes any number, such as layer_cut, layer_dp, myopic or drift_plus_penalty",
            )
        if not self.outside:
            proposed = self.planner.propose(state)
            placement = fitted(proposed, state.arch)
            if placement != proposed and shortfall(placement, state):  # cuts moved where a device was full
                placement = fitted(self.planner.propose(_with_room(state)), state.arch)
            check(placement, state)
            return placement
        with self._named("propose"):
            placement = self.planner.propose(state)
        if not isinstance(placement, Placement):
            actual = f"{placement!r:.80} of type {type(placement).__name__}"
            raise self._fault("a splitray.Placement from propose", actual, "return a Placement")
        with self._named("the check of its placement"):
            placement = fitted(placement, state.arch)
            try:
                check(placement, state)
            except PlacementError as error:
                what = f"planner {self.spec}: {error.what}"
                told = PlacementError(what, expected=error.expected, actual=error.actual, remedy=error.remedy)
                raise told from error
        return placement

    @property
    def learns(self) -> bool:
        """Whether it wants to be told what its last placement cost, see `Learner`."""
        return isinstance(self.planner, Learner)

    def observe(self, state: ClusterState, placement: Placement, *, tpot_s: float, energy_j_per_token: float) -> None:
        """See `Learner`, for a planner that `learns`.

        Raises:
            PlannerError: the planner comes from outside, and raised something.
        """
        assert isinstance(self.planner, Learner), "see learns"
        with self._named("observe"):
            self.planner.observe(state, placement, tpot_s=tpot_s, energy_j_per_token=energy_j_per_token)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A user's exception as one that says which planner it was; the original one is its cause."""
        try:
            yield
        except InputError:
            raise  # says itself what is wrong
        except Exception as error:  # a user's code may raise anything
            if not self.outside:
                raise
            expected = f"{what} without an exception, or a PlacementError where there is no placement"
            actual = f"{type(error).__name__}: {error}{raised_at(error)}"
            raise self._fault(expected, actual, "correct the planner") from error

    def _fault(self, expected: str, actual: str, remedy: str) -> PlannerError:
        return PlannerError(f"planner {self.spec}", expected=expected, actual=actual, remedy=remedy)


def _with_room(state: ClusterState) -> ClusterState:
    """As if each device had so much less memory as moving all cuts by half a block may take."""
    where, left = state.topology, 1 - 0.5 / NUM_BLOCKS
    devices = tuple(replace(d, memory_bytes=left * d.memory_bytes) for d in where.devices)
    return replace(state, topology=replace(where, devices=devices))


def raised_at(error: BaseException) -> str:
    """` (FILE:LINE)` of the innermost line that raised, to append to a message; empty where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    at, traceback = "", error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith("<frozen"):
            at = f" ({file}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return at
