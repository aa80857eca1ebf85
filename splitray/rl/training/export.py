"""A trained policy as two files that need no pickle: tensors, and a card that says what they are.

`NAME.safetensors` holds float32 tensors `AGENT.LAYER.weight` [out, in] and `AGENT.LAYER.bias` [out]; agents are
`layer_agent` and, if it decides anything, `head_ffn_agent`; layers are `whole`, `group`, `join`, `knobs`, `layer` and
`choose`. `module.py` says how they are used. The critics stay behind.

`NAME.json` holds `format`, `variant`, `bits`, `num_groups`, `hidden`, `features` (the table's hash, which a reader must
compare with its own), `leave_out`, `agents` (names, and the blocks of their logits in order), `knobs` (what the indices
mean), `recipe`, `seeds`, `results`, and the SHA-256 of the tensors' file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as tensors_bytes

from splitray.results import write_whole
from splitray.rl.training.module import PlacementModule, built
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.action import DEFAULT_KNOBS, MOVE_WEIGHTS, PRICES, V_FACTORS
from splitray.rl.world.observation import HISTORY, table_hash
from splitray.rl.world.rows import HEAD_FFN_AGENT, layouts

FORMAT = 1


def export(
    modules: Mapping[str, PlacementModule], recipe: Recipe, path: Path, results: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write `path` with the endings .safetensors and .json, and return both paths.

    `path` has no ending, and its folder is made; `results` are plain numbers for the card.
    """
    tensors_at, card_at = path.with_suffix(".safetensors"), path.with_suffix(".json")
    agents = {a: x for a, x in layouts(recipe.spec).items() if a != HEAD_FFN_AGENT or recipe.spec.low_decides}
    tensors = {
        f"{agent}.{name}": value.detach().float().contiguous()
        for agent in agents
        for name, value in modules[agent].state_dict().items()
        if not name.startswith("critic.")
    }
    data = tensors_bytes(tensors)
    write_whole(tensors_at, data)
    card = {
        "format": FORMAT,
        "variant": recipe.variant,
        "bits": recipe.bits,
        "num_groups": recipe.num_groups,
        "hidden": recipe.hidden,
        "features": table_hash(),
        "history_slots": HISTORY,
        "leave_out": list(recipe.leave_out),
        "agents": {a: [asdict(b) for b in layout.blocks] for a, layout in agents.items()},
        "knobs": {"v": V_FACTORS, "stay": MOVE_WEIGHTS, "price": PRICES, "default": DEFAULT_KNOBS},
        "recipe": recipe.as_json(),
        "seeds": [recipe.seed],
        "results": dict(results or {}),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_whole(card_at, json.dumps(card, indent=1) + "\n")
    return tensors_at, card_at


def read_modules(recipe: Recipe, tensors_at: Path) -> dict[str, PlacementModule]:
    """The networks of an exported policy of this recipe; their critics know nothing."""
    tensors, modules = load_file(tensors_at), built(recipe)
    for agent, module in modules.items():
        mine = {k.removeprefix(f"{agent}."): v for k, v in tensors.items() if k.startswith(f"{agent}.")}
        if mine:
            wrong = module.load_state_dict(mine, strict=False)
            assert all(k.startswith("critic.") for k in (*wrong.missing_keys, *wrong.unexpected_keys)), "other recipe"
    return modules
