"""What a training run of the split point depends on; the settings of Table 4 are the defaults. Knows no RLlib."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from splitray.errors import InputError
from splitray.rl.split_point.process import CORRECTED, LAST_CUT, STEPS, Case, Channel, SplitErrata, SplitPoint
from splitray.rl.split_point.quality import Noise, Quality

Algorithm = Literal["ppo", "a2c", "dqn"]
Rewards = Literal["surrogate", "measured", "in_loop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecipe:
    """A training run.

    Args:
        name: stands on the policy's card.
        algorithm: `a2c` is PPO with one epoch over one small batch, no clipping and lambda 1.
        noise: what the channel does.
        rewards: from the surrogate, from the measured table, or first the one and then the other (Algorithm 1).
        reach, case, channel, errata, last_cut: see `SplitPoint`.
        steps: decisions of the whole run; Table 3 has 24,000, the released code 240,000 (E15).
        rollout_steps: n_step, decisions between two updates, and `minibatch_steps` the batch (Table 4).
        epochs: over a rollout; with `hidden` a setting that the text does not print, from the library that it uses.
        measured_updates: updates before Algorithm 1 fits its surrogate.
    """

    name: str
    algorithm: Algorithm = "ppo"
    noise: Noise = "loss"
    rewards: Rewards = "surrogate"
    reach: int = 1
    case: Case = "A"
    channel: Channel = "endogenous"
    errata: SplitErrata = CORRECTED
    last_cut: int = LAST_CUT
    steps: int = 24_000
    seed: int = 0
    learning_rate: float = 3e-4
    gamma: float = 0.99
    clip: float = 0.2
    trace_decay: float = 0.95
    rollout_steps: int = 400
    minibatch_steps: int = 100
    epochs: int = 10
    hidden: int = 64
    measured_updates: int = 10

    def __post_init__(self) -> None:
        if self.rollout_steps % STEPS or self.rollout_steps < STEPS or self.steps < self.rollout_steps:
            raise InputError(
                "steps of a rollout",
                expected=f"whole episodes of {STEPS} steps, within the {self.steps} of the run",
                actual=self.rollout_steps,
                remedy="take a multiple",
            )

    @property
    def updates(self) -> int:
        """Number of updates of the whole run."""
        return self.steps // self.rollout_steps

    def process(self, quality: Quality) -> SplitPoint:
        """The decision process with these qualities."""
        return SplitPoint(
            quality=quality, reach=self.reach, case=self.case, channel=self.channel, errata=self.errata,
            last_cut=self.last_cut,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The recipe as plain values, for a policy's card."""
        return {**asdict(self), "errata": [flag.name for flag in self.errata]}
