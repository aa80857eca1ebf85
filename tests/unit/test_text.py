from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from os.path import commonprefix
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_made import STYLES, byte_level, made
from transformers.convert_slow_tokenizer import bytes_to_unicode

from splitray.text.decoding import Decoding
from splitray.text.detokenizer import Detokenizer
from splitray.text.stops import StopStrings
from splitray.text.stream import TextStream

TEXTS = [
    "the cat sat",
    "naïve café",
    "日本語テキスト",
    "a👩‍👩‍👧b🎉",
    " two  spaces\n\ttab ",
    "",
    "\ufffd",
    "x\ufffdy",
]
PARTS = [
    *TEXTS[:4], "مرحبًا", "é", "12 345", "  ", "\n\n", " ", "\t", " don't", " ' ", "s .", " n't", "  '", " 've", "!",
    " ?", "\ufffd", "<s>", "<|eot|>", "</s>", " <tool> ", "<think> ", "@@ ",
]  # fmt: skip
BYTE_TOKENS: dict[int, str] = bytes_to_unicode()
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
CLEANED: dict[str, bool] = {"clean_up_tokenization_spaces": True}
SETTINGS: list[dict[str, bool]] = [{}, CLEANED, {**CLEANED, FORCED: True}]


@cache
def tokenizer_of(style: str, setting: int) -> Any:
    return STYLES[style](**SETTINGS[setting]) if setting else made(style)


@cache
def decoding_of(style: str, setting: int = 0, *, skip: bool = True) -> Decoding:
    return Decoding(tokenizer_of(style, setting), skip_special_tokens=skip)


def whole(tokenizer: Any, prompt_ids: list[int], new_ids: list[int], *, skip: bool = True) -> str:
    """What transformers' decoding of all ids has beyond that of the prompt, perhaps without a character begun there."""
    parts = [prompt_ids]
    if tokenizer.decode(prompt_ids, skip_special_tokens=skip).endswith("\ufffd"):
        decoding = Decoding(tokenizer, skip_special_tokens=skip)
        seen = [i for i in prompt_ids if decoding.token(i) is not None]
        parts += [seen[:-num] for num in (1, 2, 3)]
    text, *read = (tokenizer.decode(ids, skip_special_tokens=skip) for ids in (prompt_ids + new_ids, *parts))
    return str(text[max(len(commonprefix((part, text))) for part in read) :])


def pieces(ids: Sequence[int], prompt_ids: Sequence[int] = (), style: str = "byte_level") -> list[str]:
    stream = Detokenizer(decoding_of(style), prompt_ids)
    return [*(stream.push(i) for i in ids), stream.flush()]


def ids_of(text: str, style: str = "byte_level") -> list[int]:
    return list(made(style)(text, add_special_tokens=False)["input_ids"])


def named(*tokens: str, style: str) -> list[int]:
    ids = made(style).convert_tokens_to_ids(list(tokens))
    assert None not in ids and made(style).unk_token_id not in ids
    return list(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(ids_of(text))) == text


def test_no_piece_shows_an_incomplete_character() -> None:
    ids = [i for c in "日🎉é".encode() for i in named(BYTE_TOKENS[c], style="byte_level")]
    assert len(ids) == 9
    assert [p for p in pieces(ids) if p] == ["日", "🎉", "é"]


def test_a_character_left_incomplete_at_the_end_is_one_replacement_as_in_the_whole_decoding() -> None:
    ids = ids_of("ab🎉")[:-1]
    assert pieces(ids)[-1] == "\ufffd"
    assert "".join(pieces(ids)) == made("byte_level").decode(ids)


def test_special_tokens_are_no_text_and_do_not_disturb_their_neighbours() -> None:
    (end,) = named("<|eot|>", style="byte_level")
    first, last = named(BYTE_TOKENS[0xC3], BYTE_TOKENS[0xA9], style="byte_level")
    assert "".join(pieces([end, first, end, last, end, first, last])) == "éé"


@pytest.mark.parametrize(
    ("style", "prompt", "new", "text"),
    [
        ("sentencepiece", ["▁the", "▁cat"], ["▁the", "▁", "▁", "▁the"], " the   the"),
        ("sentencepiece", [], ["▁the", "▁the"], "the the"),
        ("sentencepiece", ["<s>"], ["▁the", "▁the"], "the the"),
        ("sentencepiece", ["▁the", "<s>", "</s>"], ["▁the"], " the"),
        ("sentencepiece", ["▁the", "<0xC3>"], ["<0xA9>", "▁the"], "é the"),
        ("sentencepiece", ["▁the", "<0xE7>"], ["<0x8C>", "▁the"], "\ufffd the"),
        ("sentencepiece", ["▁the", *["<s>"] * 60], ["▁the"], " the"),
        ("sentencepiece", ["▁the", *["<0xC3>", "<0xA9>"] * 40, "<0xC3>"], ["<0xA9>", "▁the"], "é the"),
        ("sentencepiece", ["▁the", "<0xC3>", "<0xA9>"], ["<0xFF>", "▁the"], "\ufffd\ufffd\ufffd the"),
        ("metaspace", ["▁the"], ["▁", "▁the", "▁"], "  the "),
        ("metaspace", ["<s>"], ["▁the"], "the"),
        ("gemma", ["the"], ["▁cat"], " cat"),
        ("gemma", [], ["▁cat"], " cat"),
        ("wordpiece", ["the"], ["##n", "cat", "."], "n cat."),
        ("word_ends", ["the</w>"], ["cat</w>", "c"], " cat c"),
        ("ctrl", ["c@@"], ["at", "the", "m@@", "at"], "at the mat"),
    ],
)
def test_a_text_goes_on_from_the_prompt(style: str, prompt: list[str], new: list[str], text: str) -> None:
    prompt_ids, new_ids = named(*prompt, style=style), named(*new, style=style)
    assert "".join(pieces(new_ids, prompt_ids, style)) == text == whole(made(style), prompt_ids, new_ids)


def test_a_clean_up_of_spaces_that_spans_the_end_of_the_prompt_is_transformers_own() -> None:
    prompt, new = named("!", " ", " ", "'", " ", "'", "v", style="cleaned"), named("e", " ", "!", style="cleaned")
    assert made("cleaned").decode(prompt) == "! ''v", "the whole, with its earlier ids"
    assert "".join(pieces(new, prompt, "cleaned")) == "e!" == whole(made("cleaned"), prompt, new)


def test_a_run_of_fallback_bytes_comes_when_it_has_ended() -> None:
    ids = named(
        "▁the", "<0xC3>", "<0xA9>", "<0x61>", "▁the", "<0xC3>", "<0xA9>", "<0xC3>", "▁the", style="sentencepiece"
    )
    assert pieces(ids, (), "sentencepiece") == ["the", "", "", "", "éa the", "", "", "", "\ufffd\ufffd\ufffd the", ""]


def test_special_tokens_show_if_they_are_kept() -> None:
    ids = named("<s>", "the", "Ġc", "at", "<|eot|>", "<tool>", style="byte_level")
    stream = TextStream(decoding_of("byte_level", skip=False))
    assert [stream.push(i) for i in ids] == ["<s>", "the", " c", "at", "<|eot|>", "<tool>"]


def random_ids(rng: random.Random, tokenizer: Any) -> list[int]:
    """Encoded texts, any ids, or ids of which many join with their neighbours."""
    if rng.random() < 0.4:
        text = "".join(rng.choices(PARTS, k=rng.randrange(1, 12)))
        return list(tokenizer(text, add_special_tokens="</s>" not in text and rng.random() < 0.5)["input_ids"])
    vocabulary = tokenizer.get_vocab()
    joining = ["▁", "Ġ", " ", "'", "▁'", "n", ".", "@@", "@"]
    pool = [i for t, i in vocabulary.items() if t in joining or t.startswith("<0x")] or [0]
    return [rng.choice([rng.choice(pool), rng.randrange(len(vocabulary))]) for _ in range(rng.randrange(60))]


@pytest.mark.thin(5, each="style")
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("style", STYLES)
def test_streamed_equals_whole_equals_transformers_on_random_mixed_texts(style: str, part: int) -> None:
    rng = random.Random(f"{style} {part}")
    for _ in range(40):
        setting, skip = rng.randrange(len(SETTINGS)), rng.random() < 0.7
        tokenizer = tokenizer_of(style, setting)
        ids = random_ids(rng, tokenizer)
        cut = rng.choice([0, rng.randint(0, len(ids))])
        prompt, new = ids[:cut], ids[cut:]
        text = whole(tokenizer, prompt, new, skip=skip)
        told = f"{style} {SETTINGS[setting]} skip {skip}: {prompt} then {new}"
        decoding = decoding_of(style, setting, skip=skip)
        assert streamed(TextStream(decoding, prompt), new) == text, told
        starts = [rng.randrange(len(text)) for _ in range(rng.randrange(4)) if text]
        stops = [text[at : at + rng.randint(1, 4)] for at in starts] + ["qqq"]
        if rng.random() < 0.3 or any(name in s for s in stops for name in decoding.hidden.values()):
            continue
        for included in (False, True):
            stream = TextStream(decoding, prompt, stops=stops, include_end=included)
            out, num = streamed_up_to(stream, new)
            so_far = whole(tokenizer, prompt, new[:num], skip=skip)
            assert out == cut_at_first(so_far, stops, included=included), f"{told}, stops {stops}"
            assert stream.stopped == any(s in so_far for s in stops)
            assert stream.stopped or num == len(new)


def streamed(stream: TextStream, ids: Sequence[int]) -> str:
    return streamed_up_to(stream, ids)[0]


def streamed_up_to(stream: TextStream, ids: Sequence[int]) -> tuple[str, int]:
    """The text, and how many of the ids made it."""
    out = ""
    for num, token_id in enumerate(ids, 1):
        out += stream.push(token_id)
        if stream.stopped:
            return out, num
    return out + stream.flush(), len(ids)


def cut_at_first(text: str, stops: Sequence[str], *, included: bool) -> str:
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: end if included else min(starts)]
    return text


@pytest.mark.parametrize("style", ["byte_level", "sentencepiece", "metaspace"])
def test_the_work_for_a_token_does_not_grow_with_the_text(style: str) -> None:
    class Counted(Decoding):
        most = 0

        def text(self, ids: Sequence[int]) -> str:
            self.most = max(self.most, len(ids))
            return super().text(ids)

    for ids in (ids_of("the cat sat on the mat " * 100, style), [5] * 900, ids_of("<tool>the", style) * 300):
        decoding = Counted(made(style))
        stream = Detokenizer(decoding, ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == whole(made(style), ids, ids)
        held_to_the_end = style == "sentencepiece" and ids[0] == 5  # a run of fallback bytes, decoded once
        assert decoding.most <= (1900 if held_to_the_end else 60)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_string_gets_out_however_the_text_is_cut(texts: list[str], stops: list[str]) -> None:
    stream, out = StopStrings(stops), ""
    for text in texts:
        out += stream.push(text)
        assert not any(s in out for s in stops)
        if stream.matched:
            break
    else:
        out += stream.flush()
    text = "".join(texts)
    assert stream.matched == any(s in text for s in stops)
    assert out == cut_at_first(text, stops, included=False), "what only looked like a beginning comes in the end"


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert [stream.push(t) for t in ("hi\n", "\nUs", "e the", "\n", "\nUser", ":")] == [
        "hi",
        "",
        "\n\nUse the",
        "",
        "",
        "",
    ]
    assert stream.matched


def test_a_stop_string_that_completes_only_in_the_flush_still_cuts() -> None:
    stream = TextStream(decoding_of("byte_level"), stops=["k\ufffd"])
    assert streamed(stream, ids_of("ok🎉")[:-1]) == "o"
    assert stream.stopped


@pytest.mark.parametrize(
    ("stops", "text", "with_end"),
    [
        (["<|eot|>"], "the", "the"),
        (["e<|eot|>"], "th", "the"),
        (["<|eot|> c"], "the", "the c"),
        (["e<|eot|> ca"], "th", "the ca"),
        (["<|eot|>", "he<|eot|>"], "t", "the"),
        (["<|eot|>x", " cat"], "the", "the cat"),
        (["<tool>"], "the cat", "the cat<tool>"),
        (["at<tool>"], "the c", "the cat<tool>"),
        (["at</s>", "<tool> c"], "the cat", "the cat<tool> c"),
        (["<s>", "e c"], "th", "the c"),
    ],
    ids=str,
)
def test_stop_strings_of_tokens_stop_whether_they_show_or_not(stops: list[str], text: str, with_end: str) -> None:
    ids = named("the", "<|eot|>", "Ġc", "at", "<tool>", "Ġc", "at", style="byte_level")
    for included in (False, True):
        stream = TextStream(decoding_of("byte_level"), stops=stops, include_end=included)
        assert streamed(stream, ids) == (with_end if included else text)
        assert stream.stopped


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_special_token_that_is_in_no_map_stops_and_is_hidden(style: str) -> None:
    (end,) = named("<|eot|>", style=style)
    before = named("the", style=style) if style == "ctrl" else ids_of("the", style)
    stream = TextStream(decoding_of(style), before, stops=["<|eot|>"])
    assert (streamed(stream, [*before, end, *before]), stream.stopped) == (whole(made(style), before, before), True)


def test_of_special_tokens_that_begin_alike_the_longer_one_is_meant() -> None:
    decoding = Decoding(byte_level(extra_special_tokens=["<|eot|>!"]))
    words, (short, long) = ids_of("the"), [i for i, name in decoding.hidden.items() if name.startswith("<|eot|>")]
    assert decoding.hidden[long] == "<|eot|>!"
    stream = TextStream(decoding, stops=["<|eot|>!"])
    assert streamed_up_to(stream, [*words, short, *words, long, *words]) == ("thethe", 2 + 2 * len(words))


def test_the_name_of_a_special_token_stops_also_where_ordinary_tokens_spell_it() -> None:
    ids = [i for c in "the <|eot|> cat" for i in named(BYTE_TOKENS[ord(c)], style="byte_level")]
    assert streamed(TextStream(decoding_of("byte_level"), stops=["<|eot|>"]), ids) == "the "


def test_a_tokenizer_that_lists_no_added_tokens_hides_those_of_its_map() -> None:
    class Mistral:
        def __getattr__(self, name: str) -> Any:
            if name == "added_tokens_decoder":
                raise NotImplementedError("as mistral-common's says")
            return getattr(made("byte_level"), name)

    assert set(Decoding(Mistral()).hidden.values()) == {"<s>", "</s>"}


def test_an_incomplete_character_before_a_stop_token_is_a_replacement() -> None:
    ids = [*ids_of("ok🎉")[:-1], *named("<|eot|>", style="byte_level")]
    assert streamed(TextStream(decoding_of("byte_level"), stops=["<|eot|>"]), ids) == "ok\ufffd"


@pytest.mark.parametrize(
    ("skip", "included", "text"),
    [(True, False, "the"), (True, True, "the"), (False, False, "the"), (False, True, "the</s>")],
)
def test_the_end_of_sequence_shows_only_if_kept_and_included(skip: bool, included: bool, text: str) -> None:
    ids = named("the", "</s>", style="byte_level")
    stream = TextStream(decoding_of("byte_level", skip=skip), end_ids=ids[1:], include_end=included)
    assert streamed(stream, ids) == text


def test_a_stop_string_may_hold_the_end_of_sequence() -> None:
    ids = named("the", "</s>", style="byte_level")
    stream = TextStream(decoding_of("byte_level"), stops=["e</s>"], end_ids=ids[1:])
    assert (streamed(stream, ids), stream.stopped) == ("th", True)


def test_a_stop_string_may_begin_with_the_space_that_the_first_new_word_keeps() -> None:
    prompt, new = named("▁the", style="sentencepiece"), named("▁cat", "▁the", style="sentencepiece")
    assert streamed(TextStream(decoding_of("sentencepiece"), prompt, stops=[" cat"]), new) == ""
    assert streamed(TextStream(decoding_of("sentencepiece"), stops=[" cat"]), new) == "cat the"


def test_a_line_break_that_is_a_fallback_byte_stops_at_once() -> None:
    ids = named("▁the", "<0x0A>", "▁the", style="sentencepiece")
    stream = TextStream(decoding_of("sentencepiece"), stops=["\n"])
    assert streamed_up_to(stream, ids) == ("the", 2)


def test_an_id_without_a_token_is_no_text() -> None:
    ids = named("▁the", "<0xC3>", style="sentencepiece") + [5000] + named("<0xA9>", "▁the", style="sentencepiece")
    assert "".join(pieces(ids, (), "sentencepiece")) == "theé the" == made("sentencepiece").decode(ids)
