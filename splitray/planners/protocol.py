"""What a planner sees and the one thing it does. Knows no planner."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from splitray.arch import ModelArch
from splitray.codecs import Codec
from splitray.placement import Placement
from splitray.quality.accuracy import Accuracy
from splitray.queues import QueueState
from splitray.topology import DeviceId, Topology

Freedom = Literal["one_device", "layers", "heads", "all"]
"""What a planner may choose from, see `Space` in optimum/space.py."""
MANY_DEVICES = 128
"""What planners take that share sub-blocks among all devices, whose messages grow with the square of these."""
EQUAL = 5e-10
"""Predicted times that differ by no more than this share are equal; of such placements planners take the one that costs
the edge devices less energy."""


def equal_s_per_joule(topology: Topology) -> float:
    """Seconds that a joule of the edge's devices may count for, so that it decides between `EQUAL` placements only.

    Energy above idling, as equal times idle alike; 0 where nothing is known of what the edge spends.
    """
    edge = [d for d in topology.devices if d.tier == "edge"]
    most_w = max((max(abs(d.active_w - d.idle_w), 2 * d.radio_w) for d in edge), default=0.0)
    return EQUAL / most_w if most_w else 0.0


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Mean lengths of requests, at least one token each."""

    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Everything a planner may look at; it goes in as an argument and nothing else does.

    `context_tokens` are the tokens whose KV cache must fit beside the weights, summed over the sequences of a
    batch. `current` is the active placement, None before the first one, and `cached_tokens` are in its KV cache now
    (None: all of the context); `step_tokens` will be after the next step, whose prompt may not have begun (None: not
    known). `interval_tokens` are the tokens until the next decision, over which a migration must pay. `average` is the
    topology with the mean rates of the whole run, for planners that decide once; None where nothing is known but the
    present. `request` is the mean request, from which a planner may price prompts beside the later tokens. `codec` is
    how partials travel, and `accuracy` what that, and a noisy channel, was measured to cost.
    """

    arch: ModelArch
    topology: Topology
    context_tokens: int = 0
    current: Placement | None = None
    cached_tokens: int | None = None
    step_tokens: int | None = None
    interval_tokens: int = 64
    slot_s: float = 1.0
    queues: QueueState = QueueState()
    average: Topology | None = None
    request: RequestShape | None = None
    codec: Codec = "none"
    accuracy: Accuracy | None = None

    @property
    def pinned_embedding(self) -> DeviceId | None:
        """The origin where it must hold the embedding, else None."""
        return None if self.topology.origin_holds == "none" else self.topology.origin

    @property
    def pinned_head(self) -> DeviceId | None:
        """The origin where it must hold the head, else None."""
        return self.topology.origin if self.topology.origin_holds == "embedding_and_head" else None


@runtime_checkable
class Learner(Protocol):
    """A planner that learns from what its last placement cost; the executor tells it after each interval."""

    def observe(self, state: ClusterState, placement: Placement, *, tpot_s: float, energy_j_per_token: float) -> None:
        """Take in the outcome of one interval."""
        ...


class Planner(Protocol):
    """Anything that proposes a placement for a state.

    The planners of this package are named in `planners/__init__.py`; others are given as `module:Class[:ARG]` or, in
    Python, as an object. Such a class may say of itself, in attributes with these defaults:

    - `space = "all"`, a `Freedom`: what it chooses from, to which `splitray plan` compares it;
    - `once = False`: it decides at the start of a run, and again only where a device of its placement is gone;
    - `heeds_queues = False`: its proposal depends on more than rates, context and the current placement, so that it has
      to be asked in every interval;
    - `charges_moves = False`: it weighs itself what a move costs; for others the executor asks whether a move pays;
    - `most_devices = None`: how many devices it takes, where what it does grows faster than they do; of more it is not
      asked, and the user is told the number.
    """

    def propose(self, state: ClusterState) -> Placement:
        """A placement that passes `validate` for the state's arch and topology.

        Links are not looked at here: `compile_route` names a link that a placement needs and does not have.

        Raises:
            PlacementError: no placement of this planner's kind exists or fits into memory.
        """
        ...
