"""How the ids of one tokenizer become text in transformers, and what of a text the next id may still change."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no (or not yet a) character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of a byte fallback
_GOES_ON = "@@"  # at the end of a part of a word, in CTRL's tokenizer
# All patterns of transformers' clean-up begin with a space, and these are their characters but for the last ones.
_CLEANED = " 'nvr"


class Decoding:
    """A tokenizer's `decode`, as its own configuration has it, in two steps: ids to text, and cleaning up its spaces.

    Not covered: Moses' detokeniser (BioGPT), which looks at whole sentences.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._cleans_up = _cleans_up(tokenizer)
        special = {*tokenizer.all_special_ids}
        with suppress(NotImplementedError):  # mistral-common's tokenizer names all of its special tokens
            special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.hidden: dict[int, str] = {
            i: tokenizer.convert_ids_to_tokens(i) for i in sorted(special) if not self.text([i])
        }
        """The special tokens that never show, by their ids. They need not be in the map of special tokens."""

    def text(self, ids: Sequence[int]) -> str:
        """What transformers makes of these ids before it cleans up."""
        return self._tokenizer.decode(ids, **self._options)  # type: ignore[no-any-return]

    def cleaned(self, text: str) -> str:
        """Without spaces before punctuation, if that is the tokenizer's way."""
        return self._tokenizer.clean_up_tokenization(text) if self._cleans_up else text

    def num_sure(self, text: str) -> int:
        """How many characters of a text before its clean-up stay, then cleaned up too, whatever ids come next."""
        text = text.removesuffix(REPLACEMENT).removesuffix(_GOES_ON)
        space = text.find(" ", len(text.rstrip(_CLEANED))) if self._cleans_up else -1
        return len(text) if space < 0 else space

    def token(self, token_id: int) -> str | None:
        """Its name, or None if it takes no part in decoding: a hidden special token, or an id without a token."""
        return None if token_id in self.hidden else self._tokenizer.convert_ids_to_tokens(token_id)


def fallback_byte(token: str) -> int | None:
    """The byte of a fallback that it is. A run of them is decoded as a whole: one bad byte spoils all characters."""
    return int(token[3:5], 16) if _BYTE.fullmatch(token) else None


def _cleans_up(tokenizer: Any) -> bool:
    """Whether decoding removes spaces before punctuation; transformers does not where the model is a BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and (forced or not is_bpe)
