"""Token ids to text, as early as it is certain. Knows no engine and no HTTP."""

from collections import deque
from collections.abc import Sequence
from os.path import commonprefix

from splitray.text.decoding import Decoding, is_byte

_CONTEXT = 5  # ids that are kept; those of a character that is not complete are at most 3
_WINDOW = 12  # ids beyond which the earlier ones are dropped; decoding twice for every id would cost more
_PROMPT_CONTEXT = 50  # ids; clean-up may join a prompt's last spaces and quotes with what follows


class Detokenizer:
    """Incremental decoding: its pieces join to the end that the decoding of prompt and new ids has beyond the prompt's.

    A tokenizer's decoding of one id depends on its neighbours (a leading space is dropped at the start, bytes join to
    characters), so each piece is the difference of two decodings that begin at the same earlier id, perhaps one of the
    prompt. Where the prompt ends within a character, the whole character comes with the first piece. Without a prompt
    the pieces join to the decoding of the new ids.
    """

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int] = ()) -> None:
        self._decoding = decoding
        self._ids = self._tail(prompt_ids, _PROMPT_CONTEXT)
        self._out = decoding.cleaned(decoding.text(self._ids))  # of their text, what is out (or the prompt's)

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        token = self._decoding.token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        return "" if is_byte(token) else self._advance(final=False)

    def flush(self) -> str:
        """What was held back: at the end, an incomplete character is a replacement character."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text = self._decoding.text(self._ids)
        num_sure = len(text) if final else self._decoding.num_sure(text)
        sure = self._decoding.cleaned(text[:num_sure])
        new = sure[len(self._out if sure.startswith(self._out) else commonprefix((self._out, sure))) :]
        if new:
            self._out = sure
            if len(self._ids) > _WINDOW:
                self._shorten(num_held=len(text) - num_sure)
        return new

    def _shorten(self, *, num_held: int) -> None:
        ids = self._tail(self._ids, _CONTEXT)
        text = self._decoding.text(ids)
        if len(text) > num_held:
            self._ids, self._out = ids, self._decoding.cleaned(text[: len(text) - num_held])

    def _tail(self, ids: Sequence[int], least: int) -> list[int]:
        """The last `least` ids or some more, so that what follows them is decoded as after all of them."""
        tail: deque[int] = deque()
        for token_id in reversed(ids):
            token = self._decoding.token(token_id)
            if token is not None:
                tail.appendleft(token_id)
                if len(tail) >= least and not is_byte(token):
                    break
        return list(tail)
