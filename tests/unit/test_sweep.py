"""Sweeps: what is measured, that they go on where they ended, and what they refuse."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from families import family_model
from test_perplexity import STRIDE, WINDOW, folder, request  # noqa: F401
from typer.testing import CliRunner

from splitray.channel import as_channel
from splitray.codecs import Codec
from splitray.commands.cli import app
from splitray.errors import InputError
from splitray.model.reading import read_arch
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.profiling.perplexity import Scoring, run
from splitray.profiling.sweep import PerplexityMeter, SweepRequest, alternatives, read_cuts, sweep
from splitray.quality.features import (
    CHANNEL_FEATURES,
    PLACE_FEATURES,
    PlaceFeatures,
    channel_features,
    place_features,
)
from splitray.quality.in_loop import InLoop
from splitray.quality.table import QualityRow, QualityTable
from splitray.route import compile_route
from splitray.topology import Topology


def asked(folder, tmp_path, **options) -> SweepRequest:  # noqa: F811
    given = {
        "model": str(folder), "text": str(folder / "text.txt"), "out": tmp_path / "table.json", "cuts": "1,2",
        "channels": ("loss:0.1/0.4",), "window": WINDOW, "stride": STRIDE, "masks": 2,
    }  # fmt: skip
    return SweepRequest(**{**given, **options})


@pytest.fixture
def placement_file(tmp_path):
    arch, _ = read_arch(family_model("llama").config)
    chosen = make_planner("even").propose(ClusterState(arch=arch, topology=Topology.uniform(2)))
    chosen.save(tmp_path / "even.yaml")
    return str(tmp_path / "even.yaml")


def test_a_sweep_measures_what_single_runs_measure(folder, tmp_path, placement_file):  # noqa: F811
    table = sweep(asked(folder, tmp_path, codecs=("none", "int4"), placements=(placement_file,)))
    assert len(table.rows) == 3 * 2 * 2 and list(table.places) == ["cut:1", "cut:2", "even"]
    asked_of: tuple[tuple[str, Codec, int], ...] = (("loss:0.4", "none", 2), ("loss:0.1", "int4", 1))
    for channel, codec, cut in asked_of:
        alone = run(request(folder, channel=channel, codec=codec, cut=cut, masks=2))
        exact = run(request(folder))["perplexity"]
        assert len(set(alone["mask_perplexities"])) == 2
        assert table.relative_perplexity(channel, codec, f"cut:{cut}") == pytest.approx(
            alone["perplexity"] / exact, rel=1e-4
        )
    spread = run(request(folder, channel="loss:0.4", placement=placement_file, masks=2))
    assert table.relative_perplexity("loss:0.4", "none", "even") == pytest.approx(
        spread["perplexity"] / table.perplexity, rel=1e-4
    )
    assert all(row.standard_error > 0 for row in table.rows)
    back = QualityTable.load(tmp_path / "table.json")
    assert back.rows[3].perplexity == pytest.approx(table.rows[3].perplexity, rel=1e-5)
    assert [r.key for r in back.rows] == [r.key for r in table.rows]


def test_an_interrupted_sweep_goes_on_and_measures_nothing_twice(folder, tmp_path, monkeypatch):  # noqa: F811
    measured: list[tuple[object, str]] = []
    whole = PerplexityMeter.measure

    def counted(self, at, channel, codec="none"):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((at, str(channel)))
        return whole(self, at, channel, codec)

    monkeypatch.setattr(PerplexityMeter, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked(folder, tmp_path))
    assert len(QualityTable.load(tmp_path / "table.json").rows) == 3
    before = list(measured)
    measured.clear()
    told = []
    table = sweep(asked(folder, tmp_path), tell=lambda done, of: told.append((done, of)))
    assert len(measured) == 1 and not set(measured) & set(before)
    assert told[0] == (0, 4) and told[-1] == (4, 4) and len(table.rows) == 4
    measured.clear()
    sweep(asked(folder, tmp_path))
    assert not measured


@pytest.mark.parametrize("other", [{"seed": 1}, {"masks": 3}, {"window": 41}, {"tokens": 120}])
def test_another_sweep_s_file_is_refused(other, folder, tmp_path):  # noqa: F811
    sweep(asked(folder, tmp_path, cuts="1", channels=("loss:0.1",), masks=1))
    with pytest.raises(InputError, match="sweep to go on with"):
        sweep(asked(folder, tmp_path, cuts="1", channels=("loss:0.1",), **{"masks": 1, **other}))


REFUSED = {
    "a cut beyond the model": ({"cuts": "1,4"}, "cut"),
    "a cut that is none": ({"cuts": "one"}, "cut"),
    "no place": ({"cuts": None}, "cut"),
    "a loss that is none": ({"channels": ("loss:0.1/1.2",)}, "loss"),
    "a codec that does not exist": ({"codecs": ("int3",)}, "codec"),
    "no masks": ({"masks": 0}, "masks"),
    "a placement that is not there": ({"placements": ("no.yaml",)}, "placement"),
    "a text shorter than a window": ({"tokens": 30}, "text"),
    "nothing that loses anything": ({"channels": ("none",)}, "channel"),
    "a file that cannot be written": ({"out": "/dev/null/table.json"}, "table"),
}


@pytest.mark.parametrize(("options", "what"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_measured(options, what, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(PerplexityMeter, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError) as refused:
        sweep(asked(folder, tmp_path, **options))
    assert what in refused.value.what and refused.value.remedy
    assert not (tmp_path / "table.json").exists()


def test_a_meter_feeds_the_loop_that_learns_from_it(folder):  # noqa: F811
    text = str(folder / "text.txt")
    meter = PerplexityMeter(Scoring(model=str(folder), text=text, window=WINDOW, stride=STRIDE, tokens=90, masks=1))

    def measure(place, channel, codec):
        return meter.measure(round(place.state_depth * 3), channel, codec).relative_perplexity

    loop = InLoop(measure=measure, model="m", epochs=1, steps=50)
    for cut, loss in itertools.product((1, 2), (0.1, 0.3, 0.5)):
        loop.relative_perplexity(PlaceFeatures.of_cut(cut, 3), as_channel(f"loss:{loss}"))
    assert loop.end_epoch() and loop.uses_surrogate
    assert loop.relative_perplexity(PlaceFeatures.of_cut(1, 3), as_channel("loss:0.2")) >= 1
    with pytest.raises(InputError, match="cut"):
        meter.measure(4, None)


def test_cuts_and_channels_as_users_write_them():
    assert (
        read_cuts("all", 4, "m") == [1, 2, 3] and read_cuts("0,4", 4, "m") == [0, 4] and read_cuts(None, 4, "m") == []
    )
    assert alternatives("loss:0.1/0.2,unit=token") == ["loss:0.1,unit=token", "loss:0.2,unit=token"]
    assert alternatives("nakagami:1/2,1,0.3/0.5")[-1] == "nakagami:2,1,0.5" and len(alternatives("awgn:-3/3")) == 2
    assert alternatives("none") == ["none"]


def test_the_command_sweeps_shows_and_refuses(folder, tmp_path):  # noqa: F811
    out = tmp_path / "table.json"
    base = ["perplexity", "--model", str(folder), "--text", str(folder / "text.txt"), "--window", "40"]
    more = ["--masks", "2", "--cut", "1,2", "--channel", "loss:0.2/0.4", "--channel", "none", "--codec", "int8"]
    shown = CliRunner().invoke(app, [*base, *more, "--out", str(out)])
    assert shown.exit_code == 0 and "loss:0.4" in shown.output
    document = json.loads(CliRunner().invoke(app, [*base, *more, "--out", str(out), "--json"]).stdout)
    assert [(r["channel"], r["at"]) for r in document["rows"]][-1] == ("none", "cut:2")
    assert document["rows"][0]["relative_perplexity"] == pytest.approx(
        document["rows"][0]["perplexity"] / document["perplexity"]
    )
    one = json.loads(CliRunner().invoke(app, [*base, "--channel", "loss:0.4", "--masks", "2", "--json"]).stdout)
    assert one["cut"] == 1 and one["channel"] == "loss:0.4" and len(one["mask_perplexities"]) == 2
    for wrong in (["--cut", "1,2"], ["--cut", "9"], ["--channel", "loss:0.1/0.2"], ["--channel", "loss:1"],
                  ["--channel", "nakagami:0.4,1,1"], ["--codec", "none", "--codec", "int8"], ["--window", "999"],
                  ["--tokens", "20"], ["--seed", "-1"], ["--cut", "1", "--out", str(out)]):  # fmt: skip
        assert CliRunner().invoke(app, [*base, *wrong]).exit_code == 2, wrong


BROKEN = {
    "not JSON": lambda d: "{",
    "a key too many": lambda d: {**d, "more": 1},
    "another format": lambda d: {**d, "format": 2},
    "a row of a place without features": lambda d: {**d, "places": {}},
    "features that are none": lambda d: {**d, "places": {n: {"states": 1} for n in d["places"]}},
    "a channel that is none": lambda d: {**d, "rows": [{**d["rows"][0], "channel": "loss:2"}]},
    "a perplexity of nothing": lambda d: {**d, "perplexity": 0},
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_refused(breaks, tmp_path):
    path = tmp_path / "table.json"
    TABLE.save(path)
    assert QualityTable.load(path) == TABLE
    broken = breaks(json.loads(path.read_text()))
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(InputError):
        QualityTable.load(path)


TABLE = QualityTable(
    model="m", architecture="llama", num_layers=4, text="t", tokens=100, window=64, stride=32, masks=2, seed=0,
    measured_at="2026-12-01T00:00:00+00:00", perplexity=10.0, places={"cut:1": PlaceFeatures.of_cut(1, 4)},
    rows=(QualityRow(channel="loss:0.1", codec="none", at="cut:1", perplexity=11.0, standard_error=0.1),),
)  # fmt: skip


def test_what_was_not_measured_is_not_guessed():
    assert TABLE.relative_perplexity("loss:0.1", "none", "cut:1") == pytest.approx(1.1)
    with pytest.raises(InputError, match="loss:0.2"):
        TABLE.relative_perplexity("loss:0.2", "none", "cut:1")


# --- features


def route_of(placement, **options):
    arch, _ = read_arch(family_model("llama").config)
    return compile_route(placement, arch, Topology.uniform(2), **options)


def test_a_cut_s_features_are_those_of_its_route():
    arch, _ = read_arch(family_model("llama").config)
    state = ClusterState(arch=arch, topology=Topology.uniform(2))
    for cut in range(4):
        placement = make_planner(f"fixed_cut:{cut}").propose(state)
        route = route_of(placement, channel=as_channel("loss:0.1"))
        found, expected = PlaceFeatures.of_route(route), PlaceFeatures.of_cut(cut, 3)
        assert place_features(found) == pytest.approx(place_features(expected))
    with pytest.raises(InputError):
        PlaceFeatures.of_cut(5, 3)


def test_features_of_partitioned_and_replicated_layers_by_hand():
    where = Topology.uniform(2)
    a, b = where.ids
    halves = LayerPlacement(Shares.of({a: [(0, 1)], b: [(1, 3)]}), Shares.of({a: [(0, 20)], b: [(20, 40)]}))
    twice = LayerPlacement(Shares.whole(3, a, b), Shares.of({a: [(0, 20)], b: [(20, 40)]}))
    alone = LayerPlacement(Shares.whole(3, a), Shares.whole(40, a))
    head = Shares.whole(97, a)
    channel = as_channel("loss:0.1")
    # embedding on both: six boundaries of partial sums; the last one only a receives, half of it from b
    full = PlaceFeatures.of_route(route_of(Placement((halves,) * 3, (a, b), head), channel=channel))
    assert full == PlaceFeatures(
        states=0,
        state_depth=0,
        first_state=1,
        partials=1,
        partial_depth=full.partial_depth,
        first_partial=full.first_partial,
        remote_share=0.5,
        attention_share=0.5,
        side_states=0,
    )
    assert (full.partial_depth, full.first_partial) == pytest.approx((21 / 36, 1 / 6))
    half = PlaceFeatures.of_route(route_of(Placement((twice,) * 3, (a, b), head), channel=channel))
    assert (half.partials, half.attention_share) == (0.5, 0)
    # b gets a state and sends a partial sum back: the residual of a, which holds the head, stays clean
    late = PlaceFeatures.of_route(route_of(Placement((alone, alone, halves), (a,), head), channel=channel))
    assert (late.states, late.side_states, late.first_state) == (0, 1, 1)
    assert late.partials == pytest.approx(2 / 6) and late.first_partial == pytest.approx(5 / 6)
    # with the head on b, what b got is what counts
    moved = PlaceFeatures.of_route(
        route_of(Placement((alone, alone, halves), (a,), Shares.whole(97, b)), channel=channel)
    )
    assert (moved.states, moved.side_states) == (1, 0) and moved.state_depth == pytest.approx(4 / 6)


def test_channel_features_tell_channels_apart_and_are_small():
    texts = ["loss:0.1", "loss:0.1,unit=token", "loss:0.1,unit=packet:64", "loss:0.1,burst=4", "awgn:10", "sigma:0.5",
             "loss:0.1,fill=mean", "loss:0.1,fill=last", "loss:0.1,rescale", "nakagami:1,1,0.3,snr=10",
             "nakagami:1,1,0.3,snr=10,equalise"]  # fmt: skip
    rows = [tuple(channel_features(as_channel(t), "none")) for t in texts] + [tuple(channel_features(None, "int4"))]
    assert len(set(rows)) == len(rows) and all(len(r) == len(CHANNEL_FEATURES) for r in rows)
    assert all(0 <= v <= 1 for row in rows for v in row)
    equal = as_channel("nakagami:1,1,0.3245928")
    assert channel_features(equal, "none")[0] == pytest.approx(0.1, abs=1e-5)
    assert channel_features(equal, "none")[1:] == channel_features(as_channel("loss:0.1"), "none")[1:]
    assert len(PLACE_FEATURES) == len(place_features(PlaceFeatures.of_cut(1, 2)))


def test_perplexity_rises_with_loss_on_a_random_model(folder, tmp_path):  # noqa: F811
    torch.set_num_threads(1)
    table = sweep(asked(folder, tmp_path, cuts="1", channels=("loss:0/0.2/0.6",), masks=3))
    by_loss = [table.relative_perplexity(f"loss:{p}", "none", "cut:1") for p in ("0", "0.2", "0.6")]
    assert by_loss[0] == pytest.approx(1, abs=1e-5)
    assert len(set(by_loss)) == 3 and not math.isnan(sum(by_loss))
    assert replace(table, rows=()).rows == ()
