"""What may be done about lost devices, as a user says it, and which topology is left without them.

Values only: nothing here knows a connection, a run or a device that lives. Doing it is `recovery` and `returns`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from splitray.arch import ModelArch
from splitray.errors import DeviceLost, InputError
from splitray.migration import reformatted
from splitray.placement import Placement, validate
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState, Planner
from splitray.runtime.engine.backoff import Backoff
from splitray.runtime.engine.heirs import inherited
from splitray.topology import Topology

Replan = Callable[[Topology, int], Placement]
"""From the devices that are left and the tokens of context to a placement."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What an engine may do about lost devices.

    Args:
        store: URL or folder of checkpoints that all devices reach; without one, lost KV is computed from the tokens.
        every_tokens: between checkpoints; by default Young's period for `failures_per_s` and the measured cost.
        failures_per_s: how often a device is expected to fail, for that period.
        restarts: how often each device may be started anew, in `restarts_within_s`: what counts are deaths of a device
            that had come up, not tries while its host is away. Looks never end while the engine lives.
        replan: a planner (a name or an object), or a function that gives the placement that does without lost devices.
            It is tried before they are started anew; None: there is to be none.
        stand_by: devices for whose loss the others hold the slices ready that `replan` gives them then.
        fail_back: whether a device that was left out is started anew, and what it held goes back to it.
        patience_s: how long a device that lives but is not reached is waited for before it is left out.
        stall_s: without a token after which devices are asked whether they live.
        backoff: when to look again.
    """

    store: str | None = None
    every_tokens: int | None = None
    failures_per_s: float = 1 / 3600
    restarts: int = 3
    restarts_within_s: float = 600.0
    replan: str | Planner | Replan | None = None
    stand_by: tuple[str, ...] = ()
    fail_back: bool = True
    patience_s: float = 5.0
    stall_s: float = 0.5
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if isinstance(self.replan, str):
            make_planner(self.replan)  # a wrong name is refused now, and not when a device is lost
        least = {"every_tokens": 1, "restarts": 0, "restarts_within_s": 0.0, "patience_s": 0.0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value:
                raise _wrong(name, f"at least {bound}", value, "give a larger one")
        for name in ("failures_per_s", "stall_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise _wrong(name, "a positive number", getattr(self, name), "give one")
        if self.stand_by and self.replan is None:
            raise _wrong("stand_by", "a planner for the others", "replan=None", "give replan, or leave stand_by out")

    def check(self, topology: Topology) -> None:
        """See that the devices of `stand_by` are known.

        Raises:
            InputError: says which are not.
        """
        unknown = [d for d in self.stand_by if d not in topology.ids]
        if unknown:
            raise _wrong("stand_by", f"devices of the topology: {', '.join(topology.ids)}", ", ".join(unknown),
                         "name devices that are there")  # fmt: skip

    def placement(
        self, arch: ModelArch, topology: Topology, context_tokens: int, *, keeping: Placement | None = None
    ) -> Placement:
        """The placement on the devices that are left, by `replan`.

        Where a piece of `keeping`, which runs, would change its format, lost pieces go to devices of their format
        instead, and nothing else moves.

        Raises:
            InputError: nothing fits.
        """
        assert self.replan is not None, "asked for"
        if isinstance(self.replan, str) or hasattr(self.replan, "propose"):
            state = ClusterState(arch=arch, topology=topology, context_tokens=context_tokens)
            placement = make_planner(self.replan).propose(state)
        else:
            placement = self.replan(topology, context_tokens)
            validate(placement, arch, topology)
        if keeping is not None and reformatted(keeping, placement, arch):
            return inherited(keeping, arch, topology)
        return placement


def _wrong(name: str, expected: str, actual: object, remedy: str) -> InputError:
    return InputError(f"{name} of the recovery", expected=expected, actual=actual, remedy=remedy)


def without(topology: Topology, out: Collection[str]) -> Topology:
    """A topology less some devices. If the origin is among them, the first device that is left becomes it.

    Raises:
        DeviceLost: none are left, or the origin that holds pinned pieces is gone.
    """
    left = tuple(d for d in topology.devices if d.id not in out)
    if not left:
        raise DeviceLost("no device is left")
    origin = topology.origin
    if origin in out:
        if topology.origin_holds != "none":
            raise DeviceLost(f"{origin} is gone, and by origin_holds its pieces may be nowhere else")
        origin = left[0].id
    links = tuple(x for x in topology.links if x.source not in out and x.target not in out)
    return replace(topology, devices=left, links=links, origin=origin)
