"""The training loop as an RLlib Algorithm: our rollouts, RLlib's Learner, checkpoints and metrics.

RLlib's own EnvRunner is built as well (it checks the environment's spaces) but does not collect: one process with
numpy collects an order of magnitude more than its loop over sub-environments (`rollout.py`).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.utils.metrics import LEARNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from splitray.rl.env import PlacementEnv
from splitray.rl.export import export
from splitray.rl.foresight import foresee
from splitray.rl.layout import layouts
from splitray.rl.learner import SplitwiseLearner, act_of, training_data
from splitray.rl.module import PlacementModule, module_specs
from splitray.rl.recipe import Recipe
from splitray.rl.rollout import Collector, Scale
from splitray.rl.warm_start import clone

_STATE = "splitray"
_STREAM = 17  # keeps the run's randomness apart from an evaluation's with the same seed


def config_of(recipe: Recipe) -> AlgorithmConfig:
    """The complete RLlib config of a recipe: one process, one thread."""
    end = recipe.iterations * recipe.batch_slots
    entropy: Any = [[0, recipe.entropy], [end, recipe.last_entropy]]  # a schedule, which the annotation forgets
    config: AlgorithmConfig = (
        PPOConfig(algo_class=Splitwise)
        .environment(PlacementEnv, env_config={"recipe": recipe}, disable_env_checking=True)
        .framework("torch")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=1)
        .learners(num_learners=0)
        .multi_agent(policies=set(layouts(recipe.spec)), policy_mapping_fn=_same_name)
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=module_specs(recipe)))
        .training(
            learner_class=SplitwiseLearner,
            gamma=recipe.gamma,
            lambda_=recipe.trace_decay,
            lr=[[0, recipe.learning_rate], [end, recipe.last_learning_rate]],
            entropy_coeff=entropy,
            clip_param=recipe.clip,
            use_kl_loss=False,
            vf_loss_coeff=0.5,
            grad_clip=0.5,
            grad_clip_by="global_norm",
            num_epochs=recipe.num_epochs,
            minibatch_size=recipe.minibatch_slots,
            train_batch_size_per_learner=recipe.batch_slots,
        )
        .debugging(seed=recipe.seed, log_level="ERROR")
        .reporting(min_time_s_per_iteration=None, min_sample_timesteps_per_iteration=None)
    )
    return config


def _same_name(agent_id: Any, *_: Any, **__: Any) -> str:
    return str(agent_id)


def _itself(learner: Any, *_: Any) -> Any:
    return learner


class Splitwise(PPO):
    """Hierarchical PPO with two critics over placements."""

    @classmethod
    def get_default_config(cls) -> PPOConfig:
        """See RLlib."""
        return PPOConfig(algo_class=cls)

    def setup(self, config: Any) -> None:
        """Build what RLlib builds, then clone the exact program into it."""
        torch.set_num_threads(1)
        super().setup(config)
        self.recipe: Recipe = self.config.env_config["recipe"]
        rng = np.random.default_rng([self.recipe.seed, _STREAM])
        self.cloned = clone(self.modules, self.recipe, rng) if self.recipe.clone_steps else {}
        if self.recipe.foresight_steps:
            self.cloned |= foresee(self.modules, self.recipe, rng)
        self.collector = Collector(self.recipe, rng)
        self.num_slots, self.train_s = 0, 0.0

    learner_group: Any
    metrics: Any
    config: Any

    @property
    def modules(self) -> dict[str, PlacementModule]:
        """The networks that are trained, by agent."""
        (learner,) = self.learner_group.foreach_learner(_itself).result_or_errors  # the only one, in this process
        module = learner.get().module
        return {agent: module[agent].unwrapped() for agent in layouts(self.recipe.spec)}

    def training_step(self) -> None:
        """One rollout and its update."""
        recipe, started = self.recipe, time.perf_counter()
        self.collector.progress = self.num_slots / (recipe.iterations * recipe.batch_slots)
        rollout = self.collector.collect(act_of(self.modules))
        collected = time.perf_counter()
        self.num_slots += recipe.batch_slots
        results = self.learner_group.update(
            training_data=training_data(rollout),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_slots},
            num_epochs=recipe.num_epochs,
            minibatch_size=recipe.minibatch_slots,
            shuffle_batch_per_epoch=True,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        ended = time.perf_counter()
        self.train_s += ended - started
        for name, value in rollout.means.items():
            self.metrics.log_value(("placement", name), value, window=10)
        self.metrics.log_value(("loop", "slots"), self.num_slots, window=1)
        self.metrics.log_value(("loop", "slots_per_s"), self.num_slots / self.train_s, window=1)
        self.metrics.log_value(("loop", "collect_s"), collected - started, window=10)
        self.metrics.log_value(("loop", "update_s"), ended - collected, window=10)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """RLlib's checkpoint, and beside it the policy as it would be served."""
        super().save_checkpoint(checkpoint_dir)
        export(self.modules, self.recipe, Path(checkpoint_dir) / "policy")

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """RLlib's state, and what our loop remembers."""
        state = super().get_state(components, not_components=not_components, **kwargs)
        scales = {name: (s.count, s.mean, s.squares) for name, s in self.collector.scales.items()}
        rng = self.collector.rng.bit_generator.state
        state[_STATE] = {"num_slots": self.num_slots, "train_s": self.train_s, "scales": scales, "rng": rng}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stood, with environments drawn anew."""
        super().set_state(state)
        if _STATE not in state:
            return
        mine = state[_STATE]
        self.num_slots, self.train_s = mine["num_slots"], mine["train_s"]
        self.collector.rng.bit_generator.state = mine["rng"]
        for name, (count, mean, squares) in mine["scales"].items():
            scale = self.collector.scales.setdefault(name, Scale(self.recipe.gamma))
            scale.count, scale.mean, scale.squares = count, mean, squares
