import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitray.model import tiny
from splitray.model.training import corpus, tokens
from splitray.model.training.decoder import build_model, model_bits
from splitray.model.training.kneser_ney import KneserNey, discounts
from splitray.model.training.settings import TinySettings

SHIPPED = Path(tiny.__file__).parent / "shipped"
SMALL = TinySettings(
    vocabulary=300, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, batch_tokens=256, steps=4
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def text_of(kilobytes: int) -> str:
    chance = np.random.default_rng(0)
    words = ["the", "edge", "device", "sends", "its", "part", "of", "a", "layer", "to", "cloud", "workers"]
    lines = [" ".join(chance.choice(words, 12)) + ".\n" for _ in range(kilobytes * 18)]
    return "\n".join("".join(lines[i : i + 6]) for i in range(0, len(lines), 6))


# --- Kneser-Ney


def test_probabilities_sum_to_one_after_any_history():
    chance = np.random.default_rng(1)
    documents = [[0, *chance.zipf(1.5, 300).clip(1, 19).tolist()] for _ in range(8)]
    model = KneserNey(documents, 20, bos=0)
    for length in (0, 1, 2, 3, 4, 9):
        for _ in range(20):
            history = [0, *chance.integers(1, 20, length).tolist()]
            probabilities = model.distribution(history)
            assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
            assert (probabilities > 0).all()


def test_bits_are_those_of_the_distributions():
    chance = np.random.default_rng(2)
    documents = [[0, *chance.zipf(1.5, 200).clip(1, 9).tolist()] for _ in range(5)]
    unseen = [[0, *chance.zipf(1.5, 30).clip(1, 9).tolist()] for _ in range(3)]
    model = KneserNey(documents, 10, bos=0)
    expected = sum(-np.log2(model.distribution(d[:i])[d[i]]) for d in unseen for i in range(1, len(d)))
    assert model.bits(unseen) == pytest.approx(expected)


def test_spread_rows_are_the_distributions():
    chance = np.random.default_rng(4)
    model = KneserNey([[0, *chance.zipf(1.4, 200).clip(1, 9).tolist()] for _ in range(4)], 10, bos=0)
    windows = chance.zipf(1.4, (3, 12)).clip(1, 9)
    rows = model.spread(windows, model.table()).reshape(3, 11, 10)
    expected = [[model.distribution(row[: i + 1]) for i in range(11)] for row in windows]
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_bigram_by_hand():
    # Documents "a b a b a c" after bos, with a, b, c = 1, 2, 3. No order has enough counts of counts, so the
    # discounts are 0.5, 1 and 1.5.
    model = KneserNey([[0, 1, 2, 1, 2, 1, 3]], 4, bos=0, order=2)
    # Left neighbours: a after {bos, b}, b after {a}, c after {a}: 2 + 1 + 1 = 4; freed 1 + 0.5 + 0.5 = 2.
    uniform = 2 / 4 * 1 / 4
    a, b, c = 1 / 4 + uniform, 0.5 / 4 + uniform, 0.5 / 4 + uniform
    assert model.distribution([]) == pytest.approx([uniform, a, b, c])
    # After a: b twice, c once; freed 1 + 0.5 of 3.
    back = 1.5 / 3
    assert model.distribution([1]) == pytest.approx([back * uniform, back * a, 1 / 3 + back * b, 0.5 / 3 + back * c])


def test_discounts_follow_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4, 5], [40, 16, 8, 4, 3])
    y = 40 / 72
    assert discounts(counts) == pytest.approx((1 - 2 * y * 16 / 40, 2 - 3 * y * 8 / 16, 3 - 4 * y * 4 / 8))


def test_documents_do_not_touch():
    joined = KneserNey([[0, 1, 2], [0, 3, 4]], 5, bos=0, order=2)
    assert joined.distribution([2])[3] == joined.distribution([])[3]


@pytest.mark.parametrize("documents, vocabulary", [([], 10), ([[1, 2]], 10), ([[0, 1]], 100_000)])
def test_refused(documents, vocabulary):
    with pytest.raises(ValueError):
        KneserNey(documents, vocabulary, bos=0)


# --- what ships


def test_tokenizer_round_trips(tokenizer):
    for text in ("Join two paths.\n\n    os.path.join(a, *p)\n", "\tnaïve — 日本語 🙂", " leading", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_marks_turns(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be brief.<|user|>Hi<|assistant|>Hello<|eos|><|user|>Bye<|assistant|>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    specials = {tokenizer.convert_tokens_to_ids(t) for t in ("<|system|>", "<|user|>", "<|assistant|>", "<|eos|>")}
    assert ids.count(tokenizer.bos_token_id) == 1
    assert sum(i in specials for i in ids) == 6


def test_shipped_model_is_small_deep_and_grouped():
    files = sorted(path.name for path in SHIPPED.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= set(files)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16_000_000
    config = AutoModelForCausalLM.from_pretrained(SHIPPED).config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 12
    assert config.num_attention_heads >= 8
    assert config.num_key_value_heads < config.num_attention_heads


def card_scores(card: str) -> tuple[float, float]:
    neural, ngram = (re.search(rf"\| {row} \| ([0-9.]+) \|", card) for row in ("this model", "modified Kn.*?"))
    assert neural and ngram
    return float(neural[1]), float(ngram[1])


def test_shipped_card_gives_both_scores_and_the_model_is_clearly_ahead():
    card = (SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")
    neural, ngram = card_scores(card)
    assert 0.5 < neural < 0.95 * ngram < 8
    lead = 100 * (1 - neural / ngram)
    assert f"{abs(lead):.1f}%" in card.replace(" %", "%")
    assert "/home/" not in card and "/work/" not in card and "/tmp/" not in card


def test_shipped_model_keeps_its_score_on_unseen_text(tokenizer):
    # One held-out topic only, and its wording moves a little between Python versions: hence the loose bound.
    parts = corpus.split(corpus.topic_documents())
    document = max(parts.held_out, key=lambda d: len(d.text))
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    text = document.text[:6000]
    sequences = tokens.encode(tokenizer, [corpus.Document(document.name, text)])
    bits = model_bits(model, sequences, 512) / len(text.encode())
    assert bits < 1.25 * card_scores((SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8"))[0]


# --- the training


def test_training_runs_from_text_to_card(tmp_path):
    source = tmp_path / "notes.txt"
    source.write_text(text_of(40), encoding="utf-8")
    out = tmp_path / "model"
    scores = tiny.cook(corpus.file_documents([source]), out, SMALL, source.name, "python -m splitray.model.tiny")
    card = (out / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card_scores(card) == pytest.approx((scores["neural"], scores["kneser_ney"]), abs=1e-4)
    assert str(tmp_path) not in card
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    ids = AutoTokenizer.from_pretrained(out)("the edge device", return_tensors="pt")
    assert model(**ids).logits.shape[-1] == 300


def test_splitting_into_windows_scores_every_token_once():
    settings = TinySettings(**{**SMALL.__dict__, "dropout": 0.0})
    tokenizer = tokens.train_tokenizer([corpus.Document("t", text_of(20))], settings)
    model = build_model(settings, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for length, context in product((2, 9, 16, 17, 40), (8, 16)):
        bits = model_bits(model, [[0] * length], context)
        assert bits == pytest.approx((length - 1) * np.log2(len(tokenizer)), rel=1e-5)


def test_split_keeps_documents_whole_and_unseen():
    documents = [
        corpus.Document(f"d{i}", f"Paragraph {i} says something of its own, at length. " * 3) for i in range(90)
    ]
    shared = "This paragraph is found in every one of the documents, word for word."
    documents = [corpus.Document(d.name, f"{d.text}\n\n{shared}") for d in documents]
    parts = corpus.split(documents)
    names = [{d.name for d in part} for part in (parts.train, parts.check, parts.held_out)]
    assert all(names) and len(set.union(*names)) == sum(map(len, names)) == 90
    assert sum(shared in d.text for d in parts.train) == 1
    assert not any(shared in d.text for d in parts.check + parts.held_out)
    assert corpus.split(list(reversed(documents))) == parts


def test_module_document_reads_docstrings_and_comments_without_importing():
    source = (
        '"""Raise at import.\n\nIt must never run."""\nraise SystemExit\n'
        "# This comment fills two whole lines, and so it counts as prose that\n# is worth to be learnt from.\n"
        'def join(a, b):\n    """Join two pathname components, inserting a slash as needed."""\n'
    )
    document = corpus.module_document("pack.mod", source)
    assert document.text.startswith("pack.mod\n\nRaise at import.")
    assert "fills two whole lines" in document.text
    assert "pack.mod.join(a, b)\n\nJoin two" in document.text
    assert any("pack.mod.join" in q and "Join two pathname" in a for q, a in document.chats)


@pytest.mark.parametrize(
    "content, said",
    [(None, "No such file"), (b"too short\n", "too short"), (b"caf\xe9 " * 9000, "not UTF-8")],
)
def test_bad_text_exits_2(tmp_path, capsys, content, said):
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_bytes(content)
    assert tiny.main(["--text", str(source), "--out", str(tmp_path / "out"), "--steps", "1"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_budget_exits_2(tmp_path, capsys):
    assert tiny.main(["--out", str(tmp_path / "out"), "--steps", "0"]) == 2
    assert "above zero" in capsys.readouterr().err


def test_missing_device_exits_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny.main(["--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "CUDA" in capsys.readouterr().err
