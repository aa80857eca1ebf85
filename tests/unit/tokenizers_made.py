"""Small tokenizers in the style of real families, made here: no file of a real model is needed.

`MADE` has them by the name of the style. Each has ordinary tokens of a few words, special tokens, and added tokens that
are text (one of which takes the space before it).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, CTRLTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

TEXTS = [
    "the cat sat on the mat and the list of things. don't you? it's theirs, we've no more!",
    "hello world, how are you 12 345 naïve café",
    "猫が日本語を話す مرحبا بالعالم",
] * 20
SPECIAL = ("<s>", "</s>", "<|eot|>")
ADDED = ("<tool>", "<think>")


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _wrapped(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """As AutoTokenizer gives it, with the tokens that every style has."""
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    core.add_tokens([AddedToken(ADDED[0], lstrip=True, normalized=False), AddedToken(ADDED[1], rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **options)


def _pieces(decoder: Any, *, prepend: bool) -> Tokenizer:
    """A SentencePiece BPE with byte fallback."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    # A small alphabet leaves the other characters to the bytes.
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *fallback], limit_alphabet=40, show_progress=False
    )
    _trained(core, trainer).pre_tokenizer = None
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] == "<unk>"]  # bytes are plain tokens
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoder
    return core


def sentencepiece(**options: Any) -> PreTrainedTokenizerFast:
    """As llama-2: a space is put before the text, and the first one is stripped in decoding."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _wrapped(_pieces(decoders.Sequence(steps), prepend=True), **options)


def gemma(**options: Any) -> PreTrainedTokenizerFast:
    """SentencePiece with byte fallback that leaves the first space alone."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _wrapped(_pieces(decoders.Sequence(steps), prepend=False), **options)


def metaspace(**options: Any) -> PreTrainedTokenizerFast:
    """As T5 and XGLM: unigrams whose first token loses its space in decoding."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=130, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return _wrapped(_trained(core, trainer), **options)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """As gpt2 and llama-3."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return _wrapped(_trained(core, trainer), **options)


class _Ranks(TikTokenConverter):
    """transformers' own conversion, of ranks at hand."""

    ranks: dict[bytes, int]

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:  # type: ignore[override]
        return self.ranks


def tiktoken(**options: Any) -> PreTrainedTokenizerFast:
    """Byte sequences by rank, converted as transformers converts a file of tiktoken."""
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    tokens = byte_level().get_vocab()
    words = (bytes(byte_of[c] for c in t) for t in sorted(tokens, key=lambda t: tokens[t]) if set(t) <= set(byte_of))
    converter = _Ranks()
    converter.ranks = {word: rank for rank, word in enumerate(words)}
    return _wrapped(converter.converted(), **options)


def wordpiece(**options: Any) -> PreTrainedTokenizerFast:
    """As BERT: a space between tokens but for those that go on with a word, and spaces cleaned up."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=["[UNK]"], show_progress=False)
    return _wrapped(_trained(core, trainer), **({"clean_up_tokenization_spaces": True} | options))


def cleaned(**options: Any) -> PreTrainedTokenizerFast:
    """One token a character, without a decoder's own rules, and spaces cleaned up."""
    letters = sorted({*"".join(TEXTS), *" .,?!'ntmsver"})
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *letters])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return _wrapped(core, **({"clean_up_tokenization_spaces": True} | options))


def word_ends(**options: Any) -> PreTrainedTokenizerFast:
    """As openai-gpt: the last token of a word is marked, and becomes a space unless it is the last of all."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    return _wrapped(_trained(core, trainer), **options)


def byt5(**options: Any) -> ByT5Tokenizer:
    """Bytes without a fast tokenizer: bytes that are no character are dropped."""
    made = ByT5Tokenizer(extra_ids=0, **options)
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL]})
    made.add_tokens([*ADDED])
    return made


def ctrl(**options: Any) -> CTRLTokenizer:
    """Words in parts without a fast tokenizer: `@@` at a part's end joins it to the next."""
    words = ["the", "c@@", "at", "s@@", "on", "m@@", "@@", "a@@", "b", ".", "'s", "n't", "@", "猫@@", "!"]
    with TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({t: i for i, t in enumerate(["<unk>", *words])}), encoding="utf-8")
        merges.write_text("#version: 0.2\na t</w>\n", encoding="utf-8")
        made = CTRLTokenizer(str(vocab), str(merges), **options)
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL]})
    made.add_tokens([*ADDED])
    return made


STYLES: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        sentencepiece,
        gemma,
        metaspace,
        byte_level,
        tiktoken,
        wordpiece,
        cleaned,
        word_ends,
        byt5,
        ctrl,
    )  # fmt: skip
}


@cache
def made(style: str) -> Any:
    """The tokenizer of a style, made once; not to be changed."""
    return STYLES[style]()
