"""A trained policy for the cut, in numpy: features to scores of the actions, by layers of tanh; the largest is taken.

Two files: `NAME.safetensors` holds float32 `weight_0` [in, out], `bias_0` [out], ...; `NAME.json`, the card, holds the
recipe, what is seen, what was found, and the SHA-256 of the tensors' file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as tensors_bytes

from splitray.arrays import Floats32, Ints
from splitray.card import chained, read_card
from splitray.results import write_whole
from splitray.rl.split_point.policies import Policy
from splitray.rl.split_point.process import SplitPoint
from splitray.rl.split_point.recipe import SplitRecipe
from splitray.user_file import UserFile

FORMAT = 1
SEEN = ("strength of the channel over its largest", "cut over the last", "ln of the first relative perplexity",
        "steps left over all")  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitNetwork:
    """`layers` are [(weight [in, out], bias [out]), ...]."""

    layers: tuple[tuple[Floats32, Floats32], ...]

    def scores(self, x_NF: Floats32) -> Floats32:
        """Logits or values of the actions, [N, A]."""
        for weight, bias in self.layers[:-1]:
            x_NF = np.tanh(x_NF @ weight + bias)
        weight, bias = self.layers[-1]
        return x_NF @ weight + bias

    def policy(self, mdp: SplitPoint) -> Policy:
        """The action of the largest score."""

        def choose(states: Any) -> Ints:
            return self.scores(mdp.observe(states)).argmax(1)

        return choose

    def save(self, path: Path, recipe: SplitRecipe, results: Mapping[str, Any]) -> tuple[Path, Path]:
        """Write `path` with the endings .safetensors and .json; returns both."""
        tensors_at, card_at = path.with_suffix(".safetensors"), path.with_suffix(".json")
        tensors = {f"weight_{i}": w for i, (w, _) in enumerate(self.layers)}
        tensors |= {f"bias_{i}": b for i, (_, b) in enumerate(self.layers)}
        data = tensors_bytes({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()})
        write_whole(tensors_at, data)
        card = {
            "format": FORMAT,
            "layers": len(self.layers),
            "seen": list(SEEN[: len(self.layers[0][0])]),
            "recipe": recipe.as_json(),
            "results": dict(results),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_whole(card_at, json.dumps(card, indent=1) + "\n")
        return tensors_at, card_at

    @staticmethod
    def load(path: Path) -> SplitNetwork:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        remedy = "train it again with `python -m rllib_configs split_point --out DIR`"
        file = UserFile(path.with_suffix(".json"), "policy", remedy)
        card, tensors = read_card(file, path.with_suffix(".safetensors"))
        with file.understood():
            if card["format"] != FORMAT:
                raise file.wrong(f"format {FORMAT}", card["format"])
            layers = tuple((tensors[f"weight_{i}"], tensors[f"bias_{i}"]) for i in range(card["layers"]))
            if not chained(layers):
                raise file.wrong("layers that fit behind each other", [w.shape for w, _ in layers])
            return SplitNetwork(layers)
