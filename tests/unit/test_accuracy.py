"""The accuracy table: what was measured, nothing else; and that its measuring measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import splitray
from splitray.errors import InputError
from splitray.profiling import codec_loss
from splitray.profiling.perplexity import PerplexityRequest, run
from splitray.quality.accuracy import AccuracyRow, AccuracyTable

SHIPPED = Path(splitray.__file__).parent / "model" / "shipped" / "accuracy.json"


def row(codec, cut, perplexity) -> AccuracyRow:
    return AccuracyRow(codec=codec, cut=cut, perplexity=perplexity, standard_error=0.001)


TABLE = AccuracyTable(
    model="m", num_layers=12, text="t", tokens=1000, window=64, stride=32, measured_at="2026-11-30T12:00:00+00:00",
    perplexity=10.0,
    rows=(
        row("int8", 2, 10.1), row("int8", 6, 10.5), row("int8", 9, 10.2), row("int4", 6, 12.0), row("int4", None, 13.0),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("codec", "cut", "expected"),
    [
        ("none", 3, 1.0),
        ("none", None, 1.0),
        ("int8", 2, 1.01),
        ("int8", 3, 1.05),  # the worse of its measured neighbours
        ("int8", 8, 1.05),
        ("int4", 6, 1.2),
        ("int4", None, 1.3),
    ],
)
def test_relative_perplexity_is_the_measured_one(codec, cut, expected):
    assert TABLE.relative_perplexity(codec, cut) == pytest.approx(expected)


@pytest.mark.parametrize(("codec", "cut"), [("bf16", 6), ("int8", 1), ("int8", 10), ("int8", None), ("int4", 5)])
def test_what_was_not_measured_is_refused_and_never_guessed(codec, cut):
    with pytest.raises(InputError) as refused:
        TABLE.relative_perplexity(codec, cut)
    assert codec in refused.value.what and "measure" in refused.value.remedy


def test_a_table_comes_back_from_its_file(tmp_path):
    TABLE.save(tmp_path / "table.json")
    assert AccuracyTable.load(tmp_path / "table.json") == TABLE


def test_a_perplexity_below_the_exact_one_is_noise_and_no_reward():
    lucky = replace(TABLE, rows=(row("int8", 6, 9.9), row("int8", None, 9.8), row("int4", 6, 9.9), TABLE.rows[-1]))
    assert lucky.boundary_loss("int8", 0.5, 20) == (0.0, 0.0)
    state, partials = lucky.boundary_loss("int4", 0.5, 20)
    assert state == 0.0 and partials == pytest.approx(0.3 / 20)
    assert lucky.relative_perplexity("int8", 6) == pytest.approx(0.99)  # what was measured stays as it is


BROKEN = {
    "not JSON": lambda d: "{",
    "a list": lambda d: [],
    "a key too many": lambda d: {**d, "more": 1},
    "a key too few": lambda d: {k: v for k, v in d.items() if k != "tokens"},
    "rows that are no list": lambda d: {**d, "rows": {}},
    "a row that is none": lambda d: {**d, "rows": [{}]},
    "an unknown codec": lambda d: {**d, "rows": [{**d["rows"][0], "codec": "int3"}]},
    "a perplexity of nothing": lambda d: {**d, "perplexity": 0},
    "a perplexity that is no number": lambda d: {**d, "rows": [{**d["rows"][0], "perplexity": "10"}]},
    "NaN": lambda d: {**d, "perplexity": float("nan")},
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(breaks, tmp_path):
    TABLE.save(tmp_path / "table.json")
    broken = breaks(json.loads((tmp_path / "table.json").read_text()))
    (tmp_path / "table.json").write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(InputError):
        AccuracyTable.load(tmp_path / "table.json")
    with pytest.raises(InputError):
        AccuracyTable.load(tmp_path / "none.json")


def test_the_command_measures_what_splitray_perplexity_says(tmp_path):
    torch.set_num_threads(1)
    text = tmp_path / "text.txt"
    text.write_text("The list of arguments is passed to the function, which returns a new list. " * 12)
    out = tmp_path / "table.json"
    arguments = ["--text", str(text), "--cuts", "6,all", "--codecs", "int4", "--window", "128", "--out", str(out)]
    assert codec_loss.main(arguments) == 0
    table = AccuracyTable.load(out)
    asked = PerplexityRequest(model="tiny", text=str(text), window=128)
    exact, coded = (run(r) for r in (asked, replace(asked, cut=6, codec="int4")))
    assert (table.tokens, table.num_layers, table.window, table.stride) == (exact["tokens"], 12, 128, 64)
    assert table.perplexity == pytest.approx(exact["perplexity"])
    assert table.relative_perplexity("int4", 6) == pytest.approx(coded["perplexity"] / exact["perplexity"])
    assert [(r.codec, r.cut) for r in table.rows] == [("int4", 6), ("int4", None)]
    assert all(r.standard_error > 0 for r in table.rows)


@pytest.mark.parametrize(
    "arguments", [["--codecs", "int3"], ["--cuts", "six"], ["--text", "no.txt"], ["--model", "no-folder"]]
)
def test_the_command_refuses_bad_input_with_exit_code_2(arguments, tmp_path, capsys):
    assert codec_loss.main([*arguments, "--out", str(tmp_path / "table.json")]) == 2
    assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


def test_the_shipped_table_covers_every_cut_of_the_shipped_model():
    table = AccuracyTable.load(SHIPPED)
    assert (table.model, table.num_layers) == ("tiny", 12)
    for cut in [*range(1, 12), None]:
        by_codec = [table.relative_perplexity(c, cut) for c in ("none", "bf16", "int8", "int4")]
        assert by_codec[3] == max(by_codec) > 1
        assert abs(by_codec[1] - 1) < 0.002 and abs(by_codec[2] - 1) < 0.01
