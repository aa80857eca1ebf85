"""Learning where to cut with RLlib's Learners: PPO, what is left of it as A2C, and DQN, on episodes side by side.

RLlib has no A2C; one epoch over one batch, without clipping and with lambda 1, is it. Its modules and losses are used
as they are; the episodes are played here, all at once, and the advantages are those of eq. (12): eq. (16) takes values
one step too late (E5). A Learner by itself needs no Ray runtime.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.dqn_learner import QF_PREDS
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import nn

from splitray.arrays import Floats, Ints
from splitray.rl.split_point.network import SplitNetwork
from splitray.rl.split_point.process import STEPS, SplitPoint
from splitray.rl.split_point.quality import InLoopQuality
from splitray.rl.split_point.recipe import SplitRecipe

Look = Callable[[int, SplitNetwork], None]
"""Told after each update: decisions so far, and the policy as it is."""
_ANY = 1e4  # a clip that clips nothing
_DQN_BATCH, _DQN_STEPS, _DQN_TARGET = 100, 8, 500  # of an update, between two, between two targets
_EPSILON, _EXPLORED = 0.05, 0.2  # at the end, and behind this share of the run


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run gave; `seconds` are of playing and learning only."""

    network: SplitNetwork
    seconds: float
    steps: int


def config_of(recipe: SplitRecipe, mdp: SplitPoint) -> AlgorithmConfig:
    """RLlib's config: its own modules, one process, no environment of its own."""
    model: dict[str, Any] = {"fcnet_hiddens": [recipe.hidden] * 2, "fcnet_activation": "tanh", "head_fcnet_hiddens": []}
    if recipe.algorithm == "dqn":
        config: AlgorithmConfig = DQNConfig().training(
            double_q=True, dueling=False, num_atoms=1, target_network_update_freq=_DQN_TARGET, epsilon=_EPSILON,
            grad_clip=10,
        )  # fmt: skip
    else:
        a2c = recipe.algorithm == "a2c"
        config = PPOConfig().training(
            use_kl_loss=False, clip_param=_ANY if a2c else recipe.clip, vf_loss_coeff=0.5, vf_clip_param=_ANY,
            entropy_coeff=0.0, grad_clip=0.5,
        )  # fmt: skip
        model["vf_share_layers"] = False
    return (
        config.framework("torch")
        .training(lr=recipe.learning_rate, gamma=recipe.gamma, grad_clip_by="global_norm")
        .learners(num_learners=0)
        .rl_module(model_config=model)
        .debugging(seed=recipe.seed, log_level="ERROR")
    )


def train(recipe: SplitRecipe, mdp: SplitPoint, look: Look = lambda steps, network: None) -> Trained:
    """Learn from the rewards of `mdp`, which is the recipe's with whatever quality is wanted."""
    run = _Run(recipe, mdp)
    update = run.update_values if recipe.algorithm == "dqn" else run.update_policy
    seconds = 0.0
    while run.steps < recipe.steps:
        started = time.perf_counter()
        update()
        if isinstance(mdp.quality, InLoopQuality):
            mdp.quality.end_epoch()
        seconds += time.perf_counter() - started
        look(run.steps, run.network())
    return Trained(run.network(), seconds, run.steps)


def untrained(recipe: SplitRecipe, mdp: SplitPoint) -> SplitNetwork:
    """The policy before its first update."""
    return _Run(recipe, mdp).network()


def advantages(reward_TN: Floats, value_TN: Floats, *, gamma: float, trace_decay: float) -> Floats:
    """Eq. (12): A_t = sum over l of (gamma xi)^l delta_(t+l), delta_t = r_t + gamma V(s_(t+1)) - V(s_t), [T, N].

    Nothing comes behind the last step, where an episode ends.
    """
    found = np.zeros_like(reward_TN)
    later_N = next_value_N = np.zeros(reward_TN.shape[1])
    for t in reversed(range(len(reward_TN))):
        later_N = reward_TN[t] + gamma * next_value_N - value_TN[t] + gamma * trace_decay * later_N
        found[t], next_value_N = later_N, value_TN[t]
    return found


class _Run:
    """The learner, the episodes, and for DQN what it remembers."""

    def __init__(self, recipe: SplitRecipe, mdp: SplitPoint) -> None:
        self.recipe, self.mdp, self.steps = recipe, mdp, 0
        self.rng = np.random.default_rng(recipe.seed)
        torch.manual_seed(recipe.seed)
        seen = gym.spaces.Box(-np.inf, np.inf, (mdp.num_features,), np.float32)
        spaces: Any = {DEFAULT_MODULE_ID: (seen, gym.spaces.Discrete(mdp.num_actions))}
        self.learner: Any = config_of(recipe, mdp).build_learner(env=None, spaces=spaces)
        self.module: Any = self.learner.module[DEFAULT_MODULE_ID].unwrapped()
        self.memory: list[dict[str, NDArray]] = []

    def network(self) -> SplitNetwork:
        """A copy of the policy's layers as they are now."""
        parts = (
            (self.module.encoder, self.module.af)
            if self.recipe.algorithm == "dqn"
            else (self.module.encoder.actor_encoder, self.module.pi)
        )
        layers = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
        return SplitNetwork(tuple((m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()) for m in layers))

    def update_policy(self) -> None:
        """Play whole episodes and learn from them once."""
        recipe, mdp = self.recipe, self.mdp
        a2c = recipe.algorithm == "a2c"
        played: list[tuple[NDArray, ...]] = []
        states = mdp.starts(self.rng, recipe.rollout_steps // STEPS)
        for _ in range(STEPS):
            x_NF = mdp.observe(states)
            with torch.no_grad():
                told = self.module.forward_train({Columns.OBS: torch.from_numpy(x_NF)})
                value_N = self.module.compute_values({}, embeddings=told[Columns.EMBEDDINGS]).numpy()
                logit_NA = told[Columns.ACTION_DIST_INPUTS].numpy()
            log_p_NA = logit_NA - np.log(np.exp(logit_NA - logit_NA.max(1, keepdims=True)).sum(1, keepdims=True))
            log_p_NA -= logit_NA.max(1, keepdims=True)
            action_N = (log_p_NA + self.rng.gumbel(size=log_p_NA.shape)).argmax(1)
            states, reward_N = mdp.step(states, action_N, self.rng)
            chance_N = log_p_NA[np.arange(len(action_N)), action_N]
            played.append((x_NF, logit_NA, action_N, chance_N, value_N, reward_N))
        seen, logits, chosen, chances, values, rewards = zip(*played, strict=True)
        value_TN = np.array(values, np.float64)
        advantage_TN = advantages(
            np.array(rewards), value_TN, gamma=recipe.gamma, trace_decay=1.0 if a2c else recipe.trace_decay
        )
        normal_TN = (advantage_TN - advantage_TN.mean()) / (advantage_TN.std() + 1e-8)
        batch = {
            Columns.OBS: np.concatenate(seen),
            Columns.ACTIONS: np.concatenate(chosen),
            Columns.ACTION_DIST_INPUTS: np.concatenate(logits),
            Columns.ACTION_LOGP: np.concatenate(chances).astype(np.float32),
            Postprocessing.ADVANTAGES: normal_TN.ravel().astype(np.float32),
            Postprocessing.VALUE_TARGETS: (advantage_TN + value_TN).ravel().astype(np.float32),
        }
        self.steps += recipe.rollout_steps
        epochs, minibatch = (1, None) if a2c else (recipe.epochs, recipe.minibatch_steps)
        self._learn(batch, num_epochs=epochs, minibatch_size=minibatch, shuffle_batch_per_epoch=not a2c)

    def update_values(self) -> None:
        """Play episodes with some chance of any action, and learn from what is remembered as often as they are long."""
        recipe, mdp = self.recipe, self.mdp
        epsilon = max(_EPSILON, 1 - self.steps / (_EXPLORED * recipe.steps) * (1 - _EPSILON))
        states = mdp.starts(self.rng, recipe.rollout_steps // STEPS)
        for t in range(STEPS):
            x_NF = mdp.observe(states)
            with torch.no_grad():
                value_NA = self.module.compute_q_values({Columns.OBS: torch.from_numpy(x_NF)})[QF_PREDS].numpy()
            any_N: Ints = self.rng.integers(mdp.num_actions, size=len(states))
            action_N = np.where(self.rng.random(len(states)) < epsilon, any_N, value_NA.argmax(1))
            states, reward_N = mdp.step(states, action_N, self.rng)
            ones_N = np.ones(len(states), np.float32)
            self.memory.append({
                Columns.OBS: x_NF, Columns.ACTIONS: action_N, Columns.REWARDS: reward_N.astype(np.float32),
                Columns.NEXT_OBS: mdp.observe(states), Columns.TERMINATEDS: ones_N * (t == STEPS - 1),
                "weights": ones_N, "n_step": ones_N,
            })  # fmt: skip
        known = {k: np.concatenate([m[k] for m in self.memory]) for k in self.memory[0]}
        self.memory = [known]
        for _ in range(recipe.rollout_steps // _DQN_STEPS):
            self.steps += _DQN_STEPS
            rows = self.rng.integers(len(known["weights"]), size=_DQN_BATCH)
            self._learn({k: v[rows] for k, v in known.items()})

    def _learn(self, batch: dict[str, NDArray], **how: Any) -> None:
        samples = SampleBatch(batch)
        self.learner.update(
            training_data=TrainingData(batch=MultiAgentBatch({DEFAULT_MODULE_ID: samples}, len(samples))),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.steps},
            **how,
        )
