"""Token ids to text, as early as it is certain. Knows no engine and no HTTP; any tokenizer of transformers will do."""

from collections.abc import Callable, Sequence

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
