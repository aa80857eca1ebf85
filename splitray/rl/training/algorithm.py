"""The training loop as an RLlib Algorithm: our rollouts, RLlib's Learner, checkpoints and metrics.

RLlib's own EnvRunner is built as well (it checks the environment's spaces) but does not collect: one process with
numpy collects an order of magnitude more than its loop over sub-environments (`rollout.py`).
"""

import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.utils.metrics import LEARNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from splitray.rl.training.env import PlacementEnv
from splitray.rl.training.export import export
from splitray.rl.training.foresight import foresee
from splitray.rl.training.holdout import learned, program, score
from splitray.rl.training.learner import SplitwiseLearner, act_of, training_data
from splitray.rl.training.module import PlacementModule, built, module_specs
from splitray.rl.training.recipe import Recipe
from splitray.rl.training.rollout import Collector, Scale
from splitray.rl.training.warm_start import clone
from splitray.rl.world.rows import layouts

_STATE = "splitray"
_JUDGED, _JUDGED_SEED = 10, 20_000  # times in a run
_STREAM = 17  # keeps the run's randomness apart from an evaluation's with the same seed


def config_of(recipe: Recipe) -> AlgorithmConfig:
    """The complete RLlib config of a recipe: one process, one thread."""
    end = recipe.iterations * recipe.batch_slots
    entropy: Any = [[0, recipe.entropy], [end, recipe.last_entropy]]  # a schedule, which the annotation forgets
    config: AlgorithmConfig = (
        PPOConfig(algo_class=SplitwisePPO)
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


class SplitwisePPO(PPO):
    """Hierarchical PPO with two critics over placements."""

    @classmethod
    def get_default_config(cls) -> PPOConfig:
        """RLlib's hook: the config that an instance without one starts from."""
        return PPOConfig(algo_class=cls)

    def setup(self, config: Any) -> None:
        """RLlib's hook: build its learner, then our collector of rollouts."""
        torch.set_num_threads(1)
        super().setup(config)
        self.recipe: Recipe = self.config.env_config["recipe"]
        self._rng = np.random.default_rng([self.recipe.seed, _STREAM])
        self.collector = Collector(self.recipe, self._rng)
        self.num_slots, self.train_s = 0, 0.0
        self.best_ratio, self.best = float("inf"), {a: m.state_dict() for a, m in self.modules.items()}
        self.begun: dict[str, float] = {}
        self._usual: dict[str, float] = {}

    def _begin(self) -> None:
        """Clone the exact program, then learn from branches; not in `setup`, as a run that is resumed has done so."""
        started, recipe = time.perf_counter(), self.recipe
        if recipe.clone_steps:
            self.begun |= clone(self.modules, recipe, self._rng)
        if recipe.foresight_steps:
            self.begun |= foresee(self.modules, recipe, self._rng)
        self.begun["begin_s"] = time.perf_counter() - started
        self._judge()

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
        """RLlib's hook: one iteration, a rollout and its update."""
        if not self.num_slots:
            self._begin()
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
        if self.num_slots // recipe.batch_slots % max(1, recipe.iterations // _JUDGED) == 0:
            self._judge()
        self.metrics.log_value(("judged", "latency_over_program"), self.best_ratio, window=1)
        for name, value in self.begun.items():
            self.metrics.log_value(("begun", name), value, window=1)

    def _judge(self) -> None:
        """Compare with the program on cells and climates of the training, in weather of its own; keep what is best."""
        recipe, logs = self.recipe, []
        ours = learned(act_of(self.modules), recipe.spec)
        for cell in recipe.judged_on or recipe.cells[:1]:
            climate = recipe.climates[len(recipe.climates) // 2]
            waits = partial(
                score, cell=cell, climate=climate, seed=_JUDGED_SEED,
                num_instances=min(64, recipe.num_instances), num_slots=recipe.num_slots // 2,
                leave_out=frozenset(recipe.leave_out),
            )  # fmt: skip
            if cell.name not in self._usual:
                self._usual[cell.name] = float(
                    np.nanmean(waits(program(), spec=replace(recipe.spec, variant="dp_knobs")).latency_s)
                )
            logs.append(np.log(np.nanmean(waits(ours, spec=recipe.spec).latency_s) / self._usual[cell.name]))
        ratio = float(np.exp(np.mean(logs)))
        if ratio < self.best_ratio:
            self.best_ratio = ratio
            self.best = {a: {k: v.clone() for k, v in m.state_dict().items()} for a, m in self.modules.items()}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """RLlib's checkpoint, and beside it the best policy so far as it would be served."""
        super().save_checkpoint(checkpoint_dir)
        modules = built(self.recipe)
        for agent, module in modules.items():
            module.load_state_dict(self.best[agent])
        export(modules, self.recipe, Path(checkpoint_dir) / "policy")

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
        state[_STATE] = {
            "num_slots": self.num_slots, "train_s": self.train_s, "scales": scales, "rng": rng,
            "best_ratio": self.best_ratio,
            "best": {a: {k: v.numpy() for k, v in m.items()} for a, m in self.best.items()},
        }  # fmt: skip
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stood, with environments drawn anew."""
        super().set_state(state)
        if _STATE not in state:
            return
        mine = state[_STATE]
        self.num_slots, self.train_s = mine["num_slots"], mine["train_s"]
        self.best_ratio = mine["best_ratio"]
        self.best = {a: {k: torch.as_tensor(v) for k, v in m.items()} for a, m in mine["best"].items()}
        self.collector.rng.bit_generator.state = mine["rng"]
        for name, (count, mean, squares) in mine["scales"].items():
            scale = self.collector.scales.setdefault(name, Scale(self.recipe.gamma))
            scale.count, scale.mean, scale.squares = count, mean, squares
