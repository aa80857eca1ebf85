"""The network of one agent: a trunk that all groups of layers share, masks, and two critics apart from it.

The forward pass of the policy, which `export.py` writes down and a planner repeats (tanh everywhere, x W^T + b):

    e  = tanh(whole(x))                          x [F]     -> [H]
    h  = tanh(group(concat(x_g, e)))             x_g [L]   -> [G, H], for every group
    k  = tanh(join(concat(e, mean over g of h))) [2H]      -> [H]
    global logits  = knobs(k)                              the blocks that are not per group, in their order
    c  = tanh(layer(concat(h_g, h_(g-1), k)))    [3H]      -> [G, H], h_(-1) = 0
    group logits   = choose(c)                   [H]       -> [G, sum over per-group blocks of (count / G) * size]

A group's logits belong to the per-group blocks one after the other. All logits stand block by block, choice by choice,
and 1e9 is taken from those whose mask is 0. An agent that leaves groups alone has no `layer` and `choose`, and its
group logits are 0.

Shapes: B rows, F features of the whole, G groups, L features of a group, H hidden.
"""

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiCategorical
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from splitray.rl.training.env import spaces_of
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.action import Block, prior, spans
from splitray.rl.world.choosing import MASKED
from splitray.rl.world.rows import LAYER_AGENT, Layout, is_per_group, layouts


class PlacementModule(TorchRLModule, ValueFunctionAPI):
    """One agent. `model_config` is made by `module_specs`."""

    def setup(self) -> None:
        """RLlib's hook: make the layers."""
        config = self.model_config
        assert isinstance(config, dict), "see module_specs"
        self.layout: Layout = config["layout"]
        self.chooses_groups: bool = config["chooses_groups"]
        self.prior: dict[str, list[float]] = config["prior"]
        self.prior_weight: float = config["prior_weight"]
        hidden, layout = config["hidden"], self.layout
        self.per_group = [b for b in layout.blocks if is_per_group(b, layout)]
        self.whole = nn.Linear(layout.num_global, hidden)
        self.group = nn.Linear(layout.group_width + hidden, hidden)
        self.join = nn.Linear(2 * hidden, hidden)
        num_global = sum(b.count * b.size for b in layout.blocks if not is_per_group(b, layout))
        self.knobs = nn.Linear(hidden, num_global) if num_global else None
        if self.chooses_groups:
            self.layer = nn.Linear(3 * hidden, hidden)
            widths = [b.count // layout.num_groups * b.size for b in self.per_group]
            self.choose = nn.Linear(hidden, sum(widths))
        self.critic = nn.Sequential(
            nn.Linear(layout.num_global + layout.group_width, hidden), nn.Tanh(),
            nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2),
        )  # fmt: skip
        with torch.no_grad():  # begin nearly indifferent, and without an opinion of values
            for head in (self.knobs, self.choose if self.chooses_groups else None, self.critic[-1]):
                if isinstance(head, nn.Linear):
                    head.weight.mul_(0.1)
                    head.bias.zero_()
        sizes = [b.size for b in layout.blocks for _ in range(b.count)]
        distribution: Any = TorchMultiCategorical  # its classmethod is annotated as an instance's
        self.action_dist_cls = distribution.get_partial_dist_cls(input_lens=sizes)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.logits(batch[Columns.OBS])}

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of all choices for rows [B, width], masked ones at -1e9 or below, [B, logits]."""
        layout = self.layout
        x, groups_BGL, mask = self._parts(rows)
        e = torch.tanh(self.whole(x))
        spread = e[:, None].expand(-1, layout.num_groups, -1)
        h = torch.tanh(self.group(torch.cat([groups_BGL, spread], dim=2)))
        k = torch.tanh(self.join(torch.cat([e, h.mean(1)], dim=1)))
        found: dict[str, Tensor] = {}
        if self.chooses_groups:
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
            c = torch.tanh(self.layer(torch.cat([h, before, k[:, None].expand_as(h)], dim=2)))
            widths = [b.count // layout.num_groups * b.size for b in self.per_group]
            for block, part in zip(self.per_group, self.choose(c).split(widths, dim=2), strict=True):
                found[block.name] = part.flatten(1)
        else:
            for block in self.per_group:
                found[block.name] = rows.new_zeros(len(rows), block.count * block.size)
        if self.knobs is not None:
            others = [b for b in layout.blocks if not is_per_group(b, layout)]
            parts = self.knobs(k).split([b.count * b.size for b in others], dim=1)
            found |= {b.name: part for b, part in zip(others, parts, strict=True)}
        return torch.cat([found[b.name] for b in layout.blocks], dim=1) + (1 - mask) * MASKED

    def values(self, rows: Tensor) -> Tensor:
        """Expected discounted rewards to come, of performance and of the queues, [B, 2]."""
        x, groups, _ = self._parts(rows)
        return self.critic(torch.cat([x, groups.mean(1)], dim=1))

    def compute_values(self, batch: dict[str, Any], embeddings: Any | None = None) -> Tensor:
        """RLlib's interface: the sum of both, [B]."""
        return self.values(batch[Columns.OBS]).sum(-1)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        groups = rows[:, layout.num_global : layout.mask_at]
        groups_BGL = groups.reshape(-1, layout.num_groups, layout.group_width)
        return rows[:, : layout.num_global], groups_BGL, rows[:, layout.mask_at :]


def choice_log_probabilities(blocks: tuple[Block, ...], logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of actions [B, C]: log-probability of each choice, [B, C], and mean entropy of those that are open, [B].

    RLlib's distributions say the same many times slower.
    """
    each: list[Tensor] = []
    entropy = logits.new_zeros(len(logits))
    num_open = torch.zeros_like(entropy)
    for block, at, choices in spans(blocks):
        x = logits[:, at].reshape(-1, block.count, block.size)
        log_p = torch.log_softmax(x, dim=2)
        chosen = actions[:, choices].long().unsqueeze(2)
        each.append(log_p.gather(2, chosen).squeeze(2))
        entropy = entropy - (log_p.exp() * log_p.clamp(min=-100.0)).sum((1, 2))
        num_open = num_open + ((x > MASKED / 2).sum(2) > 1).sum(1)
    return torch.cat(each, dim=1), entropy / num_open.clamp(min=1)


def prior_divergence(blocks: tuple[Block, ...], logits: Tensor, prior: dict[str, list[float]]) -> Tensor:
    """KL divergence from the prior's choices, summed over the blocks that it names, [B]."""
    total = logits.new_zeros(len(logits))
    for block, at, _ in spans(blocks):
        if block.name in prior:
            log_p = torch.log_softmax(logits[:, at].reshape(-1, block.count, block.size), dim=2)
            log_prior = logits.new_tensor(prior[block.name]).log()
            total = total + (log_p.exp() * (log_p.clamp(min=-100.0) - log_prior)).sum((1, 2))
    return total


def built(recipe: Recipe) -> dict[str, PlacementModule]:
    """The networks of both agents, by agent, as they are before anything is learnt."""
    modules: dict[str, Any] = {agent: spec.build() for agent, spec in module_specs(recipe).items()}
    return modules


def module_specs(recipe: Recipe) -> dict[str, RLModuleSpec]:
    """The networks of both agents, by agent, as RLlib builds them."""
    found = {}
    for agent, layout in layouts(recipe.spec).items():
        seen, done = spaces_of(layout)
        stays = agent == LAYER_AGENT and recipe.clone_steps
        config = {
            "layout": layout,
            "hidden": recipe.hidden,
            "chooses_groups": recipe.spec.low_decides,
            "prior": prior(recipe.spec, recipe.clone_confidence) if stays else {},
            "prior_weight": recipe.prior_weight,
        }
        found[agent] = RLModuleSpec(PlacementModule, seen, done, model_config=config)
    return found
