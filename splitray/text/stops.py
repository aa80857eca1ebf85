"""The strings that end an answer, found in its text as that comes."""

from collections.abc import Sequence


class StopStrings:
    """Cuts the text before the first stop string and never lets out the beginning of one.

    The first is the one that is complete first, wherever the pieces are cut; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        """`included`: cut behind the stop string."""
        self._stops, self._included = tuple(stops), included
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string."""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.matched, self._held = True, ""
            end, start = min(found)
            return text[: end if self._included else start]
        num_held = max((_num_begun(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def would_match(self, text: str) -> bool:
        """Whether a stop string would be complete with this text."""
        return any(s in self._held + text for s in self._stops)

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
