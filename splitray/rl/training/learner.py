"""PPO with two critics (docs/equations.md E2.21, E2.22), on batches that come with their advantages; else stock PPO."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.ppo.ppo import LEARNER_RESULTS_KL_KEY, LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import ENTROPY_KEY, POLICY_LOSS_KEY, VF_LOSS_KEY
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor

from splitray.rl.training.module import PlacementModule, choice_log_probabilities, prior_divergence
from splitray.rl.training.rollout import Rollout


class SplitwiseLearner(PPOTorchLearner):
    """The clipped surrogate on summed advantages, and a squared error for each critic."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """RLlib's hook: PPO's clipped loss and the two critics' loss of one agent, over the rows that count."""
        module = self.module[module_id].unwrapped()
        assert isinstance(module, PlacementModule), "the loss knows our two critics only"
        blocks = module.layout.blocks
        each, entropy = choice_log_probabilities(blocks, fwd_out[Columns.ACTION_DIST_INPUTS], batch[Columns.ACTIONS])
        step = each.sum(1) - batch[Columns.ACTION_LOGP]
        ratio, advantages = torch.exp(step), batch[Postprocessing.ADVANTAGES]
        clipped = torch.clamp(ratio, 1 - config.clip_param, 1 + config.clip_param)
        surrogate = torch.min(advantages * ratio, advantages * clipped).mean()
        targets = batch[Postprocessing.VALUE_TARGETS]
        error = module.values(batch[Columns.OBS]) - targets
        # A queue that runs away gives targets of hundreds of deviations, which would drown all the rest.
        value_loss = torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=10.0) * 2
        coefficient = self.entropy_coeff_schedulers_per_module[module_id].get_current_value()
        with torch.no_grad():
            explained = 1 - error.var(0).sum() / targets.var(0).sum().clamp(min=1e-6)
            moved = (torch.exp(step) - 1 - step).mean()  # an estimate of the divergence that is never negative
        self.metrics.log_dict(
            {
                POLICY_LOSS_KEY: -surrogate,
                VF_LOSS_KEY: value_loss,
                ENTROPY_KEY: entropy.mean(),
                LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY: explained,
                LEARNER_RESULTS_KL_KEY: moved,
            },
            key=module_id,
            window=1,
        )
        loss = -surrogate + config.vf_loss_coeff * value_loss
        prior = module.prior
        if prior:  # takes the place of the entropy bonus: it is one, weighted by what the program would choose
            away = prior_divergence(blocks, fwd_out[Columns.ACTION_DIST_INPUTS], prior).mean()
            self.metrics.log_value((module_id, "prior_divergence"), away, window=1)
            return loss + module.prior_weight * away
        return loss - coefficient * entropy.mean()


def training_data(rollout: Rollout) -> TrainingData:
    """A rollout as RLlib's learners take it without connectors."""
    batches = {
        agent: SampleBatch(
            {
                Columns.OBS: s.rows,
                Columns.ACTIONS: s.actions,
                Columns.ACTION_LOGP: s.log_probability,
                Postprocessing.ADVANTAGES: s.advantages,
                Postprocessing.VALUE_TARGETS: s.targets,
            }
        )
        for agent, s in rollout.samples.items()
    }
    slots = len(next(iter(batches.values())))
    return TrainingData(batch=MultiAgentBatch(batches, slots))


def act_of(modules: Mapping[str, PlacementModule]) -> Any:
    """The policy of `rollout.Act` that RLlib's modules are."""

    def act(agent: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        module = modules[agent]
        with torch.no_grad():
            x = torch.from_numpy(rows)
            return module.logits(x).numpy(), module.values(x).numpy()

    return act
