"""Everything that a training run depends on, as one value: a recipe and a seed give the same policy again."""

from dataclasses import asdict, dataclass, field
from typing import Any

from splitray.rl.world.action import ActionSpec, Variant
from splitray.rl.world.cell import Cell
from splitray.rl.world.reward import Weights
from splitray.rl.world.weather import Climate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Args:
        name: stands on the policy's card.
        variant: what is left to the exact program, see `ActionSpec`; `bits` likewise.
        leave_out: kinds of features that an ablation leaves out (`history`, `placement`).
        weights: of the reward.
        cells: what is trained on; each environment is one of them, drawn anew when its weather is over.
        judged_on: cells on which the best policy of the run is found; the first one of `cells` by default.
        climates: from easy to hard; `open_at_start` of them are there from the beginning, all after half of the run.
        num_envs: environments side by side, `num_instances` of one cell each, of which `copies` share their weather.
        num_slots: of an environment's life, a multiple of `rollout_slots`.
        rollout_slots: between two updates; num_envs * num_instances * rollout_slots is the batch.
        held_slots: that the noise of an agent's choices lasts on average.
        iterations: updates of the whole run, over which the rates decay.
        gamma: discount of a slot; `trace_decay` is GAE's lambda.
        dual: two critics, for performance and for the queues; their advantages add up with `beta`.
        clone_steps: of the warm start, which imitates the exact program alone; 0 starts from scratch.
        foresight_steps: branchings that teach the agent after that (`foresight.py`), each over `foresight_slots`.
        prior_weight: of the divergence from the cloned program, where there is one. Where a choice makes no difference,
            which is in most cells, a bonus for entropy alone would wear it away, and it would not be there in the rest.
        clone_confidence: probability of the program's own choice at which cloning ends, to leave room to explore.
    """

    name: str
    seed: int = 0
    variant: Variant = "dp_knobs"
    bits: bool = False
    num_groups: int = 12
    leave_out: tuple[str, ...] = ()
    weights: Weights = field(default_factory=Weights)
    cells: tuple[Cell, ...]
    judged_on: tuple[Cell, ...] = ()
    climates: tuple[Climate, ...] = (Climate(),)
    open_at_start: float = 0.5
    num_envs: int = 4
    num_instances: int = 128
    copies: int = 2
    num_slots: int = 256
    rollout_slots: int = 16
    held_slots: float = 16.0
    iterations: int = 300
    gamma: float = 0.97
    trace_decay: float = 0.95
    dual: bool = True
    beta: float = 1.0
    hidden: int = 64
    learning_rate: float = 1e-3
    last_learning_rate: float = 1e-4
    entropy: float = 0.003
    last_entropy: float = 0.0003
    prior_weight: float = 0.001
    clip: float = 0.2
    num_epochs: int = 4
    minibatch_slots: int = 2048
    clone_steps: int = 200
    foresight_steps: int = 0
    foresight_slots: int = 20
    clone_confidence: float = 0.4

    @property
    def spec(self) -> ActionSpec:
        """The shape of both agents' actions under this recipe."""
        return ActionSpec(variant=self.variant, num_groups=self.num_groups, bits=self.bits)

    @property
    def batch_slots(self) -> int:
        """Slots of all instances together that one update learns from."""
        return self.num_envs * self.num_instances * self.rollout_slots

    def as_json(self) -> dict[str, Any]:
        """The recipe as plain values, for a policy's card; an infinite budget is None."""
        document = asdict(self)
        for climate in document["climates"]:
            climate["power_w"] = None if climate["power_w"] == float("inf") else climate["power_w"]
        return document
