"""The ids that end the turn of a model."""

import json
from pathlib import Path
from typing import Any


def end_ids(model_path: str, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the checkpoint's own, as `generate()` reads them, and the tokenizer's.

    A chat model may end its turn with another token than the tokenizer's end of sequence.
    """
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = Path(model_path) / name
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            named = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
            return [*ids, *(named if isinstance(named, list) else [] if named is None else [named])]
    return ids
