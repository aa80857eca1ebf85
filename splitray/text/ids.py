"""A text to the ids of a prompt. Knows no engine and no HTTP; any tokenizer of transformers will do."""

from typing import Any

from splitray.errors import InputError


def text_ids(text: str, tokenizer: Any, *, what: str = "prompt", **options: bool) -> list[int]:
    """The ids of a text; none of an empty one, even where a tokenizer adds a first token, which alone is no prompt.

    Args:
        text: any.
        tokenizer: of transformers.
        what: what the text is, for errors.
        options: of the tokenizer's call.

    Raises:
        InputError: it is no Unicode, or the tokenizer has no ids for it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(what, expected="text in Unicode", actual=f"a lone surrogate at {error.start}",
                         remedy="send whole characters") from error  # fmt: skip
    if not text:
        return []
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except BaseException as error:
        if not fault_of_tokenizers(error):
            raise
        raise InputError(what, expected="text that the model's tokenizer has ids for", actual=error,
                         remedy="send other words, or token ids") from error  # fmt: skip


def fault_of_tokenizers(error: BaseException) -> bool:
    """Whether the package tokenizers raised an error: a plain Exception, or a panic of Rust, which is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"
