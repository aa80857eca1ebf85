"""Between text and token ids: decoding as early as it is certain, what ends an answer, and the chat template.

It knows no HTTP and no engine; a tokenizer is whatever transformers loads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitray.errors import InputError

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no (or not yet a) character


class Detokenizer:
    """Incremental decoding whose pieces join to the decoding of all ids.

    A tokenizer's decoding of one id depends on its neighbours (a leading space is dropped at the start, bytes
    join to characters), so each piece is the difference of two decodings that begin at the same earlier id.
    Not covered: a SentencePiece byte fallback that turns invalid after a valid character; there the whole
    decoding also rewrites the valid character, which is already out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the start of the last piece
        self._num_out = 0  # how many of them are already out as text

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._ids.append(token_id)
        return self._advance(hold_incomplete=True)

    def flush(self) -> str:
        """What was held back: at the end, an incomplete character is a replacement character."""
        return self._advance(hold_incomplete=False)

    def _advance(self, *, hold_incomplete: bool) -> str:
        out, text = self._decode(self._ids[: self._num_out]), self._decode(self._ids)
        if len(text) <= len(out) or (hold_incomplete and text.endswith(REPLACEMENT)):
            return ""
        self._ids, self._num_out = self._ids[self._num_out :], len(self._ids) - self._num_out
        return text[len(out) :]


class StopStrings:
    """Cuts the text before the first stop string and never lets out the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string."""
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        num_held = max((_num_begun(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """A detokenizer followed by the stop strings."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._detokenizer, self._stops = Detokenizer(decode), StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; nothing after it counts."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """The text that this id made certain."""
        return self._stops.push(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """The rest, at the end; it too is cut at a stop string."""
        if self.stopped:
            return ""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()


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


def special_ids(stops: Sequence[str], tokenizer: Any) -> list[int]:
    """The ids of stop strings that are special tokens: those never show as text."""
    return [tokenizer.convert_tokens_to_ids(s) for s in stops if s in tokenizer.all_special_tokens]
