"""The surrogate: what it learns, that its metrics are of rows it has not seen, its files, and Algorithm 1."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from report_cells import value_of

from splitray.channel import as_channel
from splitray.errors import InputError
from splitray.evaluate.split_figures import monotone
from splitray.profiling import fit_quality
from splitray.quality.features import PlaceFeatures
from splitray.quality.in_loop import InLoop
from splitray.quality.surrogate import (
    CEILING,
    Record,
    Surrogate,
    cross_validate,
    metrics_of,
    records_of,
    shipped_surrogate,
)
from splitray.quality.table import QualityRow, QualityTable, shipped_quality

LAYERS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def truth(loss: float, cut: int) -> float:
    """Something smooth that rises with loss and falls with p."""
    return math.exp(4 * loss**1.5 * (1.2 - cut / LAYERS))


def record(loss: float, cut: int, *, model: str = "m", noise: float = 0.0, factor: float = 1.0) -> Record:
    return Record(
        model=model, place=PlaceFeatures.of_cut(cut, LAYERS), channel=as_channel(f"loss:{loss:g}"), codec="none",
        relative_perplexity=1 + factor * (truth(loss, cut) - 1) + noise,
    )  # fmt: skip


def loss_of(record: Record) -> float:
    assert record.channel is not None
    return record.channel.loss


def grid(**options) -> list[Record]:
    return [record(k / 50, cut, **options) for k in range(1, 16, 2) for cut in range(1, LAYERS)]


@pytest.fixture(scope="module")
def fitted() -> Surrogate:
    return Surrogate.fit([*grid(), *grid(model="other", factor=0.5)], steps=600)


def test_it_tells_what_lies_between_the_rows_and_says_how_well(fitted):
    m = fitted.metrics["loss_at_cut"]
    assert m == fitted.metrics["all"] and m.rows == 2 * 56
    assert m.mse < 0.001 and m.mae < 0.02 and m.r2 > 0.95 and "relative perplexity" in m.unit
    for loss, cut in ((0.08, 3), (0.2, 6), (0.28, 1)):  # losses that no row has
        where, channel = PlaceFeatures.of_cut(cut, LAYERS), as_channel(f"loss:{loss}")
        assert fitted.predict("m", where, channel) == pytest.approx(truth(loss, cut), abs=0.05)
        half = 1 + 0.5 * (truth(loss, cut) - 1)
        assert fitted.predict("other", where, channel) == pytest.approx(half, abs=0.05)


def test_nothing_lost_is_exactly_one_and_nothing_is_below(fitted):
    where = PlaceFeatures.of_cut(7, LAYERS)
    assert fitted.predict("m", where, None) == 1.0
    assert fitted.predict("m", where, as_channel("loss:0")) >= 1.0


def test_many_questions_at_once_are_the_single_ones(fitted):
    asked = [(PlaceFeatures.of_cut(p, LAYERS), as_channel(f"loss:{p / 40}")) for p in range(1, 8)]
    told = fitted.relative(np.stack([fitted.question("m", *a) for a in asked]))
    assert told == pytest.approx([fitted.predict("m", *a) for a in asked])


def test_metrics_by_hand():
    m = metrics_of(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert (m.rows, m.mae) == (3, 1.0)
    assert (m.mse, m.r2) == pytest.approx((5 / 3, 1 - 5 / 2))


def test_cross_validation_scores_rows_that_were_not_fitted_and_repeats_stay_together():
    rng = np.random.default_rng(0)
    pure_noise = [record(loss_of(r), 1, noise=float(rng.normal()) ** 2) for r in grid()]
    assert cross_validate(pure_noise, steps=300, hidden=32)["all"].r2 < 0.3  # it knows the noise of no held-out row
    once = cross_validate(grid()[:12], steps=200, hidden=8)["all"]
    twice = cross_validate(grid()[:12] * 2, steps=200, hidden=8)["all"]
    assert twice.rows == 24 and twice.mse > once.mse / 3  # seen beside itself, a row would be told exactly


def test_the_metrics_tell_the_paper_s_question_from_others():
    other = Record(model="m", place=PlaceFeatures.of_cut(2, LAYERS), channel=as_channel("awgn:5"), codec="none",
                   relative_perplexity=1.3)  # fmt: skip
    assert not other.is_loss_at_a_cut and record(0.1, 2).is_loss_at_a_cut
    for text in ("loss:0.1,unit=token", "loss:0.1,fill=mean", "loss:0.1,snr=9"):
        assert not Record(model="m", place=other.place, channel=as_channel(text), codec="none",
                          relative_perplexity=1.0).is_loss_at_a_cut  # fmt: skip
    found = Surrogate.fit([*grid(), other], steps=50).metrics
    assert (found["all"].rows, found["loss_at_cut"].rows) == (57, 56)


def test_it_comes_back_from_its_two_files_and_needs_no_torch(fitted, tmp_path):
    tensors, card = fitted.save(tmp_path / "s", about="a test")
    back = Surrogate.load(tmp_path / "s")
    where, channel = PlaceFeatures.of_cut(3, LAYERS), as_channel("loss:0.2")
    assert back.predict("m", where, channel) == pytest.approx(fitted.predict("m", where, channel), rel=1e-5)
    assert back.metrics == fitted.metrics and back.models == ("m", "other")
    assert json.loads(card.read_text())["unit"].startswith("relative perplexity")
    code = (
        "import sys; from splitray.quality.surrogate import Surrogate; "
        f"Surrogate.load({str(tmp_path / 's')!r}); print(sorted({{'torch', 'ray'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="SHA-256"):
        Surrogate.load(tmp_path / "s")


@pytest.mark.parametrize("broken", ["{", "[]", '{"format": 1}', ""])
def test_a_broken_card_is_refused(broken, fitted, tmp_path):
    _, card = fitted.save(tmp_path / "s")
    card.write_text(broken)
    with pytest.raises(InputError, match="surrogate"):
        Surrogate.load(tmp_path / "s")


def test_features_of_another_version_are_refused(fitted, tmp_path):
    _, card = fitted.save(tmp_path / "s")
    document = json.loads(card.read_text())
    card.write_text(json.dumps({**document, "inputs": document["inputs"][1:]}))
    with pytest.raises(InputError, match="inputs"):
        Surrogate.load(tmp_path / "s")


def test_bad_records_are_refused(fitted):
    with pytest.raises(InputError, match="at least one"):
        Surrogate.fit([])
    with pytest.raises(InputError, match="different questions"):
        Surrogate.fit([record(0.1, 1)] * 9)
    with pytest.raises(InputError, match="above 0"):
        Surrogate.fit([*grid(), record(0.1, 1, noise=math.nan)])
    with pytest.raises(InputError, match="model of the surrogate"):
        fitted.predict("unknown", PlaceFeatures.of_cut(1, 4), as_channel("loss:0.1"))


# --- Algorithm 1


def test_in_loop_measures_for_t_epochs_then_switches_once():
    asked = []

    def measure(place, channel, codec):
        asked.append((place, channel, codec))
        return truth(channel.loss, round(place.state_depth * LAYERS))

    loop = InLoop(measure=measure, model="m", epochs=3, steps=400)
    rng = np.random.default_rng(1)
    switched = []
    for _ in range(6):
        for _ in range(25):
            cut, loss = int(rng.integers(1, LAYERS)), float(rng.uniform(0, 0.3))
            told = loop.relative_perplexity(PlaceFeatures.of_cut(cut, LAYERS), as_channel(f"loss:{loss}"))
            if loop.uses_surrogate:
                assert told == pytest.approx(truth(loss, cut), abs=0.12)
        switched.append(loop.end_epoch())
    assert switched == [False, False, True, False, False, False] and loop.switched_at == 3
    assert len(asked) == len(loop.records) == 75 and loop.fit_s > 0 and loop.measured_s > 0
    assert loop.surrogate is not None and loop.surrogate.metrics["all"].rows == 75
    with pytest.raises(InputError):
        InLoop(measure=measure, model="m", epochs=0)


# --- what ships, and the command


@pytest.mark.parametrize(
    ("model", "losses"), [("tiny", np.arange(0.02, 0.31, 0.04)), ("tiny-neox", (0.02, 0.1, 0.2, 0.3))]
)
def test_the_shipped_tables_say_what_was_found_on_two_architectures(model, losses):
    table = shipped_quality(model)
    assert (table.model, table.num_layers, table.masks) == (model, 12, 5)
    cuts = range(1, 12)
    for cut in cuts:  # it rises with loss: drawn so that more loss only adds to less
        by_loss = [table.relative_perplexity(f"loss:{p:g}", "none", f"cut:{cut}") for p in losses]
        assert (np.diff(by_loss) > 0).all()
        assert abs(table.relative_perplexity("none", "int8", f"cut:{cut}") - 1) < 0.01
    for sigma in ("0.5", "1", "2", "3"):  # and falls with p where sigma is fixed
        by_cut = np.array([table.relative_perplexity(f"sigma:{sigma}", "none", f"cut:{p}") for p in cuts])
        assert by_cut[0] > by_cut[5] > by_cut[-1] - 0.002 and (np.diff(by_cut) < 0.01).all()
    counts = {row[:2]: [value_of(n) for n in row[2:]] for row in monotone([table]).rows}
    for way in (("sigma", "falls with p"), ("sigma", "rises with strength"), ("loss", "rises with strength"),
                ("loss", "rises with p"), ("awgn", "falls with ratio")):  # fmt: skip
        steps, _, beyond = counts[f"{model}: {way[0]}", way[1]]
        assert steps > 0 and beyond == 0, way


def test_a_step_the_other_way_is_counted_and_noise_is_told_from_more():
    table = replace(
        shipped_quality(),
        perplexity=1.0,
        rows=tuple(
            QualityRow(channel=f"{kind}:{k}", codec="none", at=f"cut:{p}", perplexity=y * k, standard_error=0.01)
            for kind in ("loss", "sigma", "awgn") for k in (1, 2) for p, y in ((1, 1.5), (2, 1.3), (3, 1.31), (4, 1.4))
        ),
    )  # fmt: skip
    counts = {row[:2]: [value_of(n) for n in row[2:]] for row in monotone([table]).rows}
    assert counts["tiny: sigma", "falls with p"] == [6, 4, 2]
    assert counts["tiny: sigma", "rises with strength"] == [4, 0, 0]


def test_the_command_fits_what_was_measured(tmp_path, capsys):
    path = tmp_path / "table.json"
    shipped_quality().save(path)
    assert fit_quality.main(["--table", str(path), "--out", str(tmp_path / "s"), "--steps", "500"]) == 0
    assert "loss_at_cut: 88 held-out rows" in capsys.readouterr().out
    found = Surrogate.load(tmp_path / "s")
    m = found.metrics["loss_at_cut"]
    assert m.mse <= 0.00548 and m.mae <= 0.05 and m.r2 >= 0.9
    table = QualityTable.load(path)
    told = [found.predict("tiny", r.place, r.channel, r.codec) for r in records_of(table)]
    assert np.abs(np.array(told) - [min(CEILING, table.relative(r)) for r in table.rows]).mean() < 0.05


def test_the_shipped_surrogate_knows_the_shipped_table():
    surrogate, table = shipped_surrogate(), shipped_quality()
    assert surrogate.metrics["all"].rows == len(table.rows), "fitted to what ships, so that a user can fit it again"
    m = surrogate.metrics["loss_at_cut"]
    assert m.mse <= 0.00548 and m.mae <= 0.05 and m.r2 >= 0.9
    off = [
        surrogate.predict(r.model, r.place, r.channel, r.codec) - min(CEILING, r.relative_perplexity)
        for r in records_of(table)
    ]
    assert np.abs(off).mean() < 0.02


@pytest.mark.parametrize("wrong", [["--table", "no.json"], ["--table", "TABLE", "--table", "TABLE"]])
def test_the_command_refuses_bad_input(wrong, tmp_path, capsys):
    path = tmp_path / "table.json"
    shipped_quality().save(path)
    arguments = [str(path) if w == "TABLE" else w for w in wrong]
    assert fit_quality.main([*arguments, "--out", str(tmp_path / "s")]) == 2
    assert "expected" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        fit_quality.main(["--table", str(path), "--folds", "1", "--out", str(tmp_path / "s")])
