"""Perplexity: equal to the plain recipe, whole or split, and nothing bad left out or accepted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import family_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from splitray.errors import InputError, ModelError
from splitray.model.reading import read_arch
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.profiling.perplexity import PerplexityRequest, Window, losses, read_ids, run, window_and_stride, windows
from splitray.topology import Topology

TEXT = " ".join(str(n * n * 7919 % 89) for n in range(150))
WINDOW, STRIDE = 40, 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random llama whose weights are scaled up, so that its predictions differ, with a tokenizer of numbers."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    model = family_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(path)
    core = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0").save_pretrained(path)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


def request(folder, **options) -> PerplexityRequest:
    given = {"model": str(folder), "text": str(folder / "text.txt"), "window": WINDOW, "stride": STRIDE}
    return PerplexityRequest(**{**given, **options})


def reference(folder, window: int, stride: int) -> tuple[float, int]:
    """The recipe of transformers' documentation, each window weighted by the tokens that it scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    length, previous, total, count = ids.shape[1], 0, 0.0, 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids[:, begin:end], labels=labels).loss) * scored
        count += scored
        previous = end
        if end == length:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(40, 13), (40, 39), (128, 64), (30, 1)])
def test_whole_and_cut_equal_the_plain_recipe(folder, window, stride):
    expected, tokens = reference(folder, window, stride)
    for cut in (None, 1):
        got = run(request(folder, cut=cut, window=window, stride=stride))
        assert got["tokens"] == tokens
        assert got["perplexity"] == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_the_mean_is_over_tokens_and_not_over_windows(folder):
    ids = read_ids(str(folder), TEXT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nll = losses(ids, lambda x, keep: model(x, logits_to_keep=keep).logits, WINDOW, STRIDE)
    sizes = [w.stop - w.first for w in windows(len(ids), WINDOW, STRIDE)]
    by_window = np.mean([part.mean() for part in np.split(nll, np.cumsum(sizes)[:-1])])
    assert len(set(sizes)) > 1
    assert abs(math.exp(by_window) - run(request(folder))["perplexity"]) > 0.01


def test_the_document_says_what_ran(folder):
    whole, tokens = run(request(folder, seed=7)), len(read_ids(str(folder), TEXT)) - 1
    assert whole.pop("mask_perplexities") == [whole["perplexity"]]
    assert {k: v for k, v in whole.items() if k != "perplexity"} == {
        "tokens": tokens, "channel": "none", "codec": "none", "cut": None, "placement": None, "seed": 7,
        "weights": "float32",
    }  # fmt: skip
    cut = run(request(folder, cut=2))
    assert cut["cut"] == 2
    assert [set(x["attention"]) for x in cut["placement"]["layers"]] == [{"edge0"}, {"edge0"}, {"cloud0"}]


def test_a_placement_file_runs_on_the_devices_that_it_names(folder, tmp_path):
    arch, _ = read_arch(family_model("llama").config)
    chosen = make_planner("random", seed=5).propose(ClusterState(arch=arch, topology=Topology.uniform(3)))
    chosen.save(tmp_path / "placement.yaml")
    got = run(request(folder, placement=tmp_path / "placement.yaml"))
    assert got["placement"] == chosen.to_document() and got["cut"] is None
    assert got["perplexity"] == pytest.approx(run(request(folder))["perplexity"], rel=1e-5)


def test_a_codec_changes_the_perplexity_a_little_and_without_a_cut_takes_the_middle(folder):
    exact = run(request(folder))["perplexity"]
    off = {c: abs(run(request(folder, codec=c, cut=1))["perplexity"] / exact - 1) for c in ("bf16", "int8", "int4")}
    assert 0 < off["bf16"] < off["int4"] < 0.2 and 0 < off["int8"] < 0.02
    assert run(request(folder, codec="int4"))["cut"] == 1  # of three layers


def test_a_channel_is_averaged_over_masks_that_follow_from_the_seed(folder):
    asked = request(folder, channel="loss:0.4", masks=3)
    found, again, other = run(asked), run(asked), run(replace(asked, seed=1))
    assert found == again and found["cut"] == 1 and found["mask_perplexities"] != other["mask_perplexities"]
    mean = np.mean(np.log(found["mask_perplexities"]))
    assert found["perplexity"] == pytest.approx(math.exp(mean))
    assert run(request(folder, channel="loss:0", masks=2))["perplexity"] == pytest.approx(
        run(request(folder))["perplexity"], rel=1e-5
    )


def test_windows_score_every_token_once_with_something_before_it():
    for tokens, window, stride in ((150, 40, 13), (40, 40, 13), (41, 40, 13), (2, 40, 13), (7, 2, 1)):
        seen: list[int] = []
        for w in windows(tokens, window, stride):
            assert w.begin < w.first < w.stop <= w.begin + window
            seen += range(w.first, w.stop)
        assert seen == list(range(1, tokens))
    assert list(windows(60, 40, 13)) == [Window(0, 1, 40), Window(13, 40, 53), Window(26, 53, 60)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_likelihood_that_is_not_finite_fails_and_says_where(bad):
    def forward(ids, keep):
        logits = torch.zeros(1, keep, 97)
        if int(ids[0, 0]) == 13:  # the second window
            logits[0, 2] = bad
        return logits

    with pytest.raises(ModelError) as refused:
        losses(range(90), forward, WINDOW, STRIDE)
    assert "token 42" in refused.value.what and "window 2 of 5" in refused.value.actual


def test_a_model_with_a_nan_weight_fails_through_the_wire_too(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for options in ({}, {"cut": 1}, {"cut": 1, "codec": "int8"}, {"cut": 1, "codec": "int4"}):
        with pytest.raises(ModelError, match="finite"):
            run(request(folder, model=str(tmp_path), **options))


REFUSED = {
    "a codec that does not exist": ({"codec": "int3"}, "codec"),
    "a channel that does not exist": ({"channel": "smoke"}, "channel"),
    "a cut beyond the model": ({"cut": 4}, "cut"),
    "a certain loss": ({"channel": "loss:1"}, "loss"),
    "no masks": ({"channel": "loss:0.1", "masks": 0}, "masks"),
    "a text shorter than a window": ({"window": 128, "tokens": 100}, "text"),
    "a negative cut": ({"cut": -1}, "cut"),
    "a cut and a placement": ({"cut": 1, "placement": "x.yaml"}, "placement"),
    "a placement file that is not there": ({"placement": "no.yaml"}, "placement"),
    "formats that a planner would choose": ({"weights": "best"}, "weights best"),
    "a window beyond the context": ({"window": 129}, "window"),
    "a stride as long as the window": ({"stride": WINDOW}, "stride"),
    "a stride of nothing": ({"stride": 0}, "stride"),
    "a text that is not there": ({"text": "no.txt"}, "text"),
}


@pytest.mark.parametrize(("options", "what"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(folder, options, what):
    with pytest.raises(InputError) as refused:
        run(request(folder, **options))
    assert what in refused.value.what and refused.value.remedy and "--planner" not in refused.value.remedy


def test_texts_that_cannot_be_scored_are_refused(folder, tmp_path):
    for content, why in ((b"", "two tokens"), (b"7", "two tokens"), (b"\xff\xfe7 8", "UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        with pytest.raises(InputError, match=why):
            run(request(folder, text=str(tmp_path / "text.txt")))
    family_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        run(request(folder, model=str(tmp_path)))


def test_the_defaults_stay_within_a_short_context():
    config = family_model("llama").config
    assert window_and_stride(config, None, None) == (128, 64)
    assert window_and_stride(config, None, 100) == (128, 100)
