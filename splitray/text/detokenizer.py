"""Token ids to text, as early as it is certain. Knows no engine and no HTTP."""

from collections import deque
from collections.abc import Sequence
from os.path import commonprefix

from splitray.text.decoding import REPLACEMENT, Decoding, fallback_byte

_CONTEXT = 5  # ids that are kept when text came; of them the last alone can have more that is held back
_WINDOW = 12  # ids beyond which the earlier ones are dropped; decoding twice for every id would cost more
_MOST_BEGUN = 3  # ids of a character that is not complete
_PROMPT_CONTEXT = 50  # ids; clean-up may join a prompt's last spaces and quotes with what follows


class Detokenizer:
    """Incremental decoding: its pieces join to what the decoding of prompt and new ids has beyond the prompt's.

    A tokenizer's decoding of one id depends on its neighbours (a leading space is dropped at the start, bytes join to
    characters), so each piece is the difference of two decodings that begin at the same earlier id, perhaps one of the
    prompt. Where the prompt ends within a character, the whole character comes with the first piece. Without a prompt
    the pieces join to the decoding of the new ids.
    """

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int] = ()) -> None:
        self._decoding = decoding
        self._ids = ids = self._tail(prompt_ids, _PROMPT_CONTEXT)
        # What is out of their text. The prompt's has several readings if it ends within a character that may go on.
        self._out = [decoding.cleaned(decoding.text(ids))]
        if self._out[0].endswith(REPLACEMENT):
            self._out += [decoding.cleaned(decoding.text(ids[:-num])) for num in range(1, _MOST_BEGUN + 1)]

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        token = self._decoding.token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        return "" if fallback_byte(token) is not None else self._advance(final=False)

    def flush(self) -> str:
        """What was held back: at the end, an incomplete character is a replacement character."""
        return self._advance(final=True)

    def run_so_far(self) -> str:
        """What is held back of a run of fallback bytes that ends with an ASCII character: a line break may be one."""
        token = self._decoding.token(self._ids[-1]) if self._ids else None
        byte = None if token is None else fallback_byte(token)
        if byte is None or byte > 0x7F:
            return ""
        return self._beyond_out(self._decoding.cleaned(self._decoding.text(self._ids)))

    def _advance(self, *, final: bool) -> str:
        text = self._decoding.text(self._ids)
        num_sure = len(text) if final else self._decoding.num_sure(text)
        sure = self._decoding.cleaned(text[:num_sure])
        new = self._beyond_out(sure)
        if new:
            self._out = [sure]
            if len(self._ids) > _WINDOW:
                self._ids = self._tail(self._ids, _CONTEXT)
                shorter = self._decoding.text(self._ids)
                self._out = [self._decoding.cleaned(shorter[: len(shorter) - (len(text) - num_sure)])]
        return new

    def _beyond_out(self, text: str) -> str:
        return text[max([len(o) if text.startswith(o) else len(commonprefix((o, text))) for o in self._out]) :]

    def _tail(self, ids: Sequence[int], least: int) -> list[int]:
        """The last `least` ids or some more, so that what follows them is decoded as after all of them."""
        tail: deque[int] = deque()
        for token_id in reversed(ids):
            token = self._decoding.token(token_id)
            if token is not None:
                tail.appendleft(token_id)
                if len(tail) >= least and fallback_byte(token) is None:
                    break
        return list(tail)
