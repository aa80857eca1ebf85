"""The dialogue as text in the model's chat template, and the ids that end the model's turn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitray.errors import InputError


def chat_text(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """A dialogue in the model's own chat template, ready for the assistant's turn; special tokens are in the text.

    Raises:
        InputError: the model has no template, or the template refuses the dialogue.
    """
    from jinja2 import TemplateError

    expected = "a dialogue that the model's chat template takes"
    if not tokenizer.chat_template:
        raise InputError(
            "messages", expected=expected, actual="this model has no chat template", remedy="use /v1/completions"
        )
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(
            "messages",
            expected=expected,
            actual=f"refused by the chat template: {error}",
            remedy="correct the messages",
        ) from error
    return text


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
