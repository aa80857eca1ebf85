"""What planners choose for a model on this machine: predicted after a short calibration, then run and measured."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitray.cost import CostModel
from splitray.placement import Placement
from splitray.planners import ClusterState, make_planner
from splitray.profiling.calibration import PROMPT, Calibration, Model, token_s
from splitray.runtime.kept_fleet import KeptFleet
from splitray.scratch import scratch_folder
from splitray.topology import Topology

_NEW_TOKENS, _RUNS = 48, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerTrial:
    """One placement on device processes of this machine: a later token as predicted and as measured (a median)."""

    name: str
    placement: Placement
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to what was measured."""
        return self.predicted_s / self.measured_s - 1


def choose(
    model: Path,
    planners: Sequence[str],
    others: Mapping[str, Placement],
    *,
    num_devices: int = 2,
    rounds: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[PlannerTrial], Topology]:
    """Calibrate on random models of this one's shape, let the planners choose, and run their choices and the others.

    The model is llama-like; what several planners choose alike runs once. `others` are placements to compare with, on
    devices named as `Topology.uniform` does; `rounds` are of the calibration.

    Returns:
        The choices, and this machine as it was measured.

    Raises:
        DeviceLost: a device did not come up or died.
    """
    where = Topology.uniform(num_devices)
    with scratch_folder() as folder, KeptFleet(where.devices) as fleet:
        progress("measuring this machine")
        split = Model(model, where, fleet)
        calibration = Calibration(fleet, where, folder, like=split.arch)
        for _ in range(rounds):
            calibration.round()
        measured = calibration.profile().topology()
        state = ClusterState(arch=split.arch, topology=measured, context_tokens=len(PROMPT) + _NEW_TOKENS)
        chosen = {name: make_planner(name).propose(state) for name in planners}
        cost = CostModel(split.arch, measured)
        found: list[PlannerTrial] = []
        for name, placement in {**chosen, **others}.items():
            alike = next((c for c in found if c.placement == placement), None)
            if alike is not None:
                found.append(replace(alike, name=name))
                continue
            progress(f"running the placement of {name}")
            with split.start(placement) as engine:
                measured_s = statistics.median(token_s(engine, _NEW_TOKENS) for _ in range(_RUNS))
            predicted_s = cost.tpot_s(placement, context_tokens=len(PROMPT) + _NEW_TOKENS / 2)
            found.append(PlannerTrial(name=name, placement=placement, predicted_s=predicted_s, measured_s=measured_s))
    return found, measured
