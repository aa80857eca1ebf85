"""A trained policy of any recipe, read from its two files and run by numpy. Knows neither RLlib nor Ray nor torch.

The forward pass is that of `rl/training/module.py`, without the critics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from splitray.arrays import Bools, Floats32, Ints
from splitray.card import read_card
from splitray.rl.grid.choice import MODES
from splitray.rl.world.action import (
    DEFAULT_KNOBS,
    FREE,
    MOVE_WEIGHTS,
    PRICES,
    V_FACTORS,
    ActionSpec,
    Variant,
    num_logits,
)
from splitray.rl.world.choosing import MASKED, greedy
from splitray.rl.world.observation import GROUP_FEATURES, kept, table_hash
from splitray.rl.world.reward import Weights
from splitray.rl.world.rows import HEAD_FFN_AGENT, LAYER_AGENT, Layout, is_per_group, layouts
from splitray.user_file import UserFile


@dataclass(frozen=True)
class Policy:
    """The networks of one file, and its card; which agents there are depends on the variant."""

    card: dict[str, Any]
    tensors: dict[str, Floats32]

    @staticmethod
    def load(path: str | Path) -> Policy:
        """Read `PATH.safetensors` and `PATH.json`.

        Raises:
            InputError: a file is missing or damaged, or the policy was trained for other features or other actions.
        """
        path = Path(path)
        path = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
        file = UserFile(path.with_suffix(".json"), "policy", "export it again with `python -m rllib_configs`")
        card, tensors = read_card(file, path.with_suffix(".safetensors"))
        variants = get_args(Variant)
        if card.get("variant") not in variants:
            raise file.wrong(f"variant one of {', '.join(variants)}", card.get("variant"))
        knobs = {"v": V_FACTORS, "stay": MOVE_WEIGHTS, "price": PRICES, "default": DEFAULT_KNOBS}
        for key, value in {"features": table_hash(), "knobs": {k: list(x) for k, x in knobs.items()}}.items():
            if card.get(key) != value:
                raise file.wrong(f"{key} {value}", card.get(key))
        policy = Policy(card, tensors)
        with file.understood():
            blocks = {a: [asdict(b) for b in layout.blocks] for a, layout in policy._agents.items()}
            if card.get("agents") != blocks:
                raise file.wrong(f"agents with the choices of {policy.spec}", f"{card.get('agents')!r:.200}")
            shapes = policy._shapes()
            found = {name: tensor.shape for name, tensor in policy.tensors.items()}
            for name in sorted(shapes.keys() | found.keys()):
                if shapes.get(name) != found.get(name):
                    raise file.wrong(f"tensor {name} of shape {shapes.get(name)}", found.get(name))
            assert policy.weights and policy._layers and len(policy._stay), "what is made when it is asked for, too"
        return policy

    @cached_property
    def spec(self) -> ActionSpec:
        """The shape of the actions that it was trained to take."""
        card = self.card
        return ActionSpec(variant=card["variant"], num_groups=card["num_groups"], bits=card["bits"])

    @cached_property
    def weights(self) -> Weights:
        """Weights of the reward that it was trained on."""
        return msgspec.convert(self.card["recipe"]["weights"], Weights)

    def knobs(self, whole: Floats32, groups: Floats32) -> Ints:
        """The likeliest knobs for features [N, F] and [N, G, L], [N, 3]."""
        blocks = tuple(b for b in self._agents[LAYER_AGENT].blocks if b.name != "mode")
        return greedy(blocks, self._forward(LAYER_AGENT, *self._kept(whole, groups))["knobs"])

    def high(self, whole: Floats32, groups: Floats32, mask: Bools | None = None) -> Ints:
        """The layer agent's likeliest action, [N, choices]; without a mask, groups are left to the program."""
        if not self.spec.low_decides:
            knobs = self.knobs(whole, groups)
            return np.concatenate([np.full((len(knobs), self.spec.num_groups), FREE), knobs], axis=1)
        assert mask is not None, "modes have to fit"
        return self._act(LAYER_AGENT, *self._kept(whole, groups), mask)

    def low(self, whole: Floats32, groups: Floats32, modes: Ints, mask: Bools) -> Ints:
        """The second agent's likeliest action after the first one's modes [N, G], [N, choices]."""
        whole, groups = self._kept(whole, groups)
        chosen = (modes[:, :, None] == np.arange(1 + MODES)).astype(np.float32)
        return self._act(HEAD_FFN_AGENT, whole, np.concatenate([groups, chosen], axis=2), mask)

    def _kept(self, whole: Floats32, groups: Floats32) -> tuple[Floats32, Floats32]:
        """Without the features that were left out in training, and zeros for groups that a small model lacks."""
        whole, groups = whole * self._stay[0], groups * self._stay[1]
        if missing := self.card["num_groups"] - groups.shape[1]:
            groups = np.pad(groups, ((0, 0), (0, missing), (0, 0)))
        return whole, groups

    def _act(self, agent: str, whole: Floats32, groups: Floats32, mask: Bools) -> Ints:
        layout, heads = self._agents[agent], self._forward(agent, whole, groups)
        found, at, first = [], 0, 0  # columns read so far of `groups` and `knobs`
        for block in layout.blocks:
            if is_per_group(block, layout):
                width = block.count // layout.num_groups * block.size
                found.append(heads["groups"][:, :, at : at + width].reshape(len(whole), -1))
                at += width
            else:
                width = num_logits((block,))
                found.append(heads["knobs"][:, first : first + width])
                first += width
        return greedy(layout.blocks, np.where(mask, np.concatenate(found, axis=1), np.float32(MASKED)))

    def _forward(self, agent: str, whole: Floats32, groups: Floats32) -> dict[str, Floats32]:
        """Logits of the blocks that are not per group, `knobs` [N, ..], and of those that are, `groups` [N, G, ..]."""
        layers = self._layers[agent]

        def linear(name: str, x: Floats32) -> Floats32:
            weight, bias = layers[name]
            return np.asarray(x @ weight + bias, np.float32)

        e = np.tanh(linear("whole", whole))
        (of_group, bias), width = layers["group"], groups.shape[2]
        h = np.tanh(groups @ of_group[:width] + (e @ of_group[width:] + bias)[:, None])  # e is the same for all groups
        k = np.tanh(linear("join", np.concatenate([e, h.mean(1)], axis=1)))
        found = {"knobs": linear("knobs", k)} if "knobs" in layers else {}
        if "choose" in layers:
            before = np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
            spread = np.broadcast_to(k[:, None], h.shape)
            found["groups"] = linear("choose", np.tanh(linear("layer", np.concatenate([h, before, spread], axis=2))))
        return found

    @cached_property
    def _agents(self) -> dict[str, Layout]:
        """Those that decide anything."""
        return {a: x for a, x in layouts(self.spec).items() if a != HEAD_FFN_AGENT or self.spec.low_decides}

    @cached_property
    def _layers(self) -> dict[str, dict[str, tuple[Floats32, Floats32]]]:
        """Each agent's layers: weights [in, out] and bias."""
        found: dict[str, dict[str, tuple[Floats32, Floats32]]] = {a: {} for a in self._agents}
        for name, weight in self.tensors.items():
            agent, layer, kind = name.split(".")
            if kind == "weight":
                found[agent][layer] = np.ascontiguousarray(weight.T), self.tensors[f"{agent}.{layer}.bias"]
        return found

    @cached_property
    def _stay(self) -> tuple[Floats32, Floats32]:
        left_out = frozenset(self.card["leave_out"])
        return kept(left_out), kept(left_out, GROUP_FEATURES)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What `training/export.py` writes for this spec."""
        hidden: int = self.card["hidden"]
        found: dict[str, tuple[int, ...]] = {}
        for agent, layout in self._agents.items():
            apart = num_logits(tuple(b for b in layout.blocks if not is_per_group(b, layout)))
            each = (num_logits(layout.blocks) - apart) // layout.num_groups
            sizes = {
                "whole": (hidden, layout.num_global),
                "group": (hidden, layout.group_width + hidden),
                "join": (hidden, 2 * hidden),
            }
            if apart:
                sizes["knobs"] = apart, hidden
            if self.spec.low_decides:
                sizes |= {"layer": (hidden, 3 * hidden), "choose": (each, hidden)}
            for layer, shape in sizes.items():
                found |= {f"{agent}.{layer}.weight": shape, f"{agent}.{layer}.bias": shape[:1]}
        return found
