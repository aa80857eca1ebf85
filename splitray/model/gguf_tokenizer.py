"""The tokenizer and the chat template of a GGUF file, as transformers makes them of its metadata."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from splitray.errors import TokenizerError
from splitray.model.gguf_file import GgufFile


def has_tokens(file: GgufFile) -> bool:
    """Whether a file has a tokenizer."""
    return "tokenizer.ggml.model" in file.metadata


def tokenizer_of(file: GgufFile) -> Any:
    """A tokenizer of transformers, with the file's chat template if it has one.

    Raises:
        TokenizerError: the file has none, or one that transformers does not read; the model runs with ids.
    """
    path = file.files[0]
    if not has_tokens(file):
        raise TokenizerError(f"GGUF file {path}", expected="a tokenizer in its metadata", actual="none",
                             remedy="use --prompt-ids with `splitray generate`")  # fmt: skip
    try:
        architecture, values, config = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(architecture, values)
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template")
        given = {n: config[n] for n in names if config.get(n) is not None}
        backend = _without_more(backend, len(values["tokens"]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False,
                                       name_or_path=str(path), **given)  # fmt: skip
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
        said = " ".join(str(error).split())[:300]
        raise TokenizerError(f"GGUF file {path}: tokenizer", expected="one that transformers reads",
                             actual=f"{type(error).__name__}: {said}",
                             remedy="use --prompt-ids with `splitray generate`") from error  # fmt: skip


def _without_more(made: Tokenizer, tokens: int) -> Tokenizer:
    """Without what transformers adds to some tokenizers behind the tokens of the file: the model has no rows for it."""
    if made.get_vocab_size(with_added_tokens=True) <= tokens:
        return made
    values = json.loads(made.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < tokens]
    return Tokenizer.from_str(json.dumps(values))
