"""The strings that end an answer: cut from its text, or met as the ids of special tokens."""

from collections.abc import Sequence
from typing import Any


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


def special_ids(stops: Sequence[str], tokenizer: Any) -> list[int]:
    """The ids of stop strings that are special tokens: those never show as text."""
    return [tokenizer.convert_tokens_to_ids(s) for s in stops if s in tokenizer.all_special_tokens]
