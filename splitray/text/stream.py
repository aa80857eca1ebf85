"""The text of one answer, token by token, until an end comes."""

from collections.abc import Collection, Sequence

from splitray.text.decoding import Decoding
from splitray.text.detokenizer import Detokenizer
from splitray.text.stops import StopStrings

_FIRST_MARK = 0xD800  # a surrogate, which no text has


class TextStream:
    """A detokenizer followed by the stop strings.

    A stop string may be, or contain, a special token that does not show: where that comes, a mark stands between the
    texts around it.
    """

    def __init__(
        self,
        decoding: Decoding,
        prompt_ids: Sequence[int] = (),
        *,
        stops: Sequence[str] = (),
        end_ids: Collection[int] = (),
        include_end: bool = False,
    ) -> None:
        """`prompt_ids`: what the text goes on from. `include_end`: what ends the text is part of it."""
        named = sorted((name, i) for i, name in decoding.hidden.items() if any(name in s for s in stops))
        self._marks = {token_id: chr(_FIRST_MARK + n) for n, (_, token_id) in enumerate(named)}
        self._unmarked = dict.fromkeys(range(_FIRST_MARK, _FIRST_MARK + len(named)))
        marked = list(stops)
        for name, token_id in reversed(named):  # of two that begin alike the longer one first
            marked = [s.replace(name, self._marks[token_id]) for s in marked]
        self._detokenizer = Detokenizer(decoding, prompt_ids)
        self._may_stop = bool(stops)
        self._stops = StopStrings([*stops, *marked], included=include_end)
        self._silent = () if include_end else {*end_ids} - {*decoding.hidden}

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; nothing after it counts."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """The text that this id made certain."""
        if token_id in self._silent:
            return ""
        if token_id in self._marks:  # for a stop string, the text before is complete
            return self._past_stops(self._detokenizer.flush() + self._marks[token_id])
        text = self._detokenizer.push(token_id)
        if self._may_stop and not text and self._stops.would_match(self._detokenizer.run_so_far()):
            text = self._detokenizer.flush()  # with this id as the last, that is certain
        return self._past_stops(text)

    def flush(self) -> str:
        """The rest, at the end; it too is cut at a stop string."""
        if self.stopped:
            return ""
        rest = self._past_stops(self._detokenizer.flush())
        return rest + self._stops.flush().translate(self._unmarked)

    def _past_stops(self, text: str) -> str:
        return self._stops.push(text).translate(self._unmarked)
