"""The text of one answer, token by token, until a stop string comes."""

from collections.abc import Callable, Sequence

from splitray.text.detokenizer import Detokenizer
from splitray.text.stops import StopStrings


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
