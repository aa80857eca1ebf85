from __future__ import annotations

from collections.abc import Sequence

import pytest
from fake_engine import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from splitray.text.detokenizer import Detokenizer
from splitray.text.stops import StopStrings
from splitray.text.stream import TextStream

TOKENIZER = byte_tokenizer()
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


def decode(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(ids: list[int]) -> list[str]:
    stream = Detokenizer(decode)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert "".join(pieces(ids)) == text


def test_no_piece_shows_an_incomplete_character() -> None:
    ids = TOKENIZER("日🎉é")["input_ids"]
    assert len(ids) > 6
    assert all("\ufffd" not in piece for piece in pieces(ids))
    assert [p for p in pieces(ids) if p] == ["日", "🎉", "é"]


def test_a_character_left_incomplete_at_the_end_is_one_replacement_as_in_the_whole_decoding() -> None:
    ids = TOKENIZER("ab🎉")["input_ids"][:-1]
    assert pieces(ids)[-1] == "\ufffd"
    assert "".join(pieces(ids)) == decode(ids)


def test_special_tokens_are_no_text_and_do_not_disturb_their_neighbours() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    ids = TOKENIZER("é")["input_ids"]
    assert "".join(pieces([end, *ids, end, *ids])) == "éé"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_decode_in_pieces_as_they_do_whole(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == decode(ids)


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
    whole = "".join(texts)
    assert whole.startswith(out)
    assert stream.matched == any(s in whole for s in stops)
    if stream.matched:
        assert any(whole[len(out) :].startswith(s) for s in stops), "cut exactly where a stop string begins"
    else:
        assert out == whole, "what only looked like a beginning comes in the end"


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
    ids = TOKENIZER("ok🎉")["input_ids"][:-1]
    stream = TextStream(decode, ["k\ufffd"])
    assert "".join(stream.push(i) for i in ids) + stream.flush() == "o"
    assert stream.stopped
