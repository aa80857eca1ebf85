"""Ids that files and prompts name: those for which the model has no row are refused before a device starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import save_family
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from splitray.commands.cli import app
from splitray.errors import InputError, ModelError
from splitray.model.reading import read_config
from splitray.runtime.generation import read_prompt
from splitray.runtime.launch import launch_engine, read_tokenizer

pytestmark = pytest.mark.usefixtures("no_device_starts")
ROWS = 97
WORDS = {f"w{i}": i for i in range(ROWS - 7)}  # fewer than rows: tables are padded


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_family("llama", folder)
    return folder


def copied(llama: Path, to: Path, file: str, **values: object) -> Path:
    """A copy with other values in one of its JSON files."""
    shutil.copytree(llama, to / "model")
    path = to / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return to / "model"


def tokenized(llama: Path, to: Path, vocab: dict[str, int], *added: AddedToken | str, **named: Any) -> Path:
    """A copy with a tokenizer of words."""
    shutil.copytree(llama, to / "model")
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(to / "model")
    return to / "model"


def generate(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", "--model", str(model), "--runtime", "local", *map(str, arguments)])


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [5000, ROWS, [1, 5000], "two"], ids=str)
def test_a_file_that_names_a_token_which_the_model_does_not_have_is_refused(llama, tmp_path, file, name, value):
    by_transformers = rf"{file}: expected a config of llama that transformers reads.*{name}"
    with pytest.raises(ModelError, match=rf"{name} in {file}|{by_transformers}"):
        read_config(copied(llama, tmp_path, file, **{name: value}))


def test_the_command_says_which_file_and_value_and_what_to_do(llama, tmp_path):
    result = generate(copied(llama, tmp_path, "generation_config.json", eos_token_id=[2, 5000]), "--prompt-ids", "5,6")
    assert result.exit_code == 2
    for word in ("eos_token_id in generation_config.json", "[0, 97)", "5000", "correct it"):
        assert word in result.stderr


def test_a_generation_config_that_is_no_json_is_refused(llama, tmp_path):
    folder = copied(llama, tmp_path, "config.json")
    (folder / "generation_config.json").write_text("{")
    assert generate(folder, "--prompt-ids", "5").exit_code == 2
    with pytest.raises(ModelError, match=r"generation_config.json.*JSON object"):
        launch_engine(model=folder, runtime="local")


@pytest.mark.parametrize("value", [-1, None, 96, [1, 96]], ids=str)
def test_none_is_said_in_several_ways(llama, tmp_path, value):
    read_config(copied(llama, tmp_path, "generation_config.json", eos_token_id=value, pad_token_id=-1))


@pytest.mark.parametrize(("family", "default"), [("gpt2", 50256), ("glm4", [151329, 151336, 151338])])
def test_the_default_of_a_family_says_nothing_of_a_model(tmp_path, caplog, family, default):
    """They are in many configs of small models; transformers runs those."""
    save_family(family, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": default}))
    assert read_config(tmp_path).vocab_size == ROWS
    assert "eos_token_id in config.json" in caplog.text and str(default) in caplog.text


@pytest.mark.parametrize(
    ("vocab", "added", "named", "said"),
    [
        (WORDS | {"w96": 96, "w97": 97, "w98": 98}, [], {}, r"'w97' \(97\), 'w98' \(98\).*resize_token_embeddings\(99"),
        ({f"w{i}": i for i in range(ROWS)}, ["<new>"], {}, r"'<new>' \(97\)"),
        ({f"w{i}": i for i in range(ROWS)}, [], {"eos_token": "<end>"}, r"'<end>' \(97\)"),
        ({f"w{i}": i for i in range(ROWS)}, [], {"bos_token": "<start>"}, r"'<start>' \(97\)"),
    ],
)  # fmt: skip
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(llama, tmp_path, vocab, added, named, said):
    folder = tokenized(llama, tmp_path, vocab, *added, **named)
    with pytest.raises(ModelError, match=f"tokenizer of .*model: .*{said}"):
        read_tokenizer(folder)
    result = generate(folder, "--prompt", "w5 w6")
    assert result.exit_code == 2 and "the vocabulary of config.json" in result.stderr
    with pytest.raises(ModelError, match="tokenizer of"):
        launch_engine(model=folder, runtime="local")


def test_a_marker_past_the_rows_is_named_and_refused_where_a_prompt_has_it(llama, tmp_path, caplog):
    """Padding that was added to a tokenizer alone, or a mark for images: no plain text has it."""
    vocab = {f"w{i}": i for i in range(ROWS)}
    folder = tokenized(llama, tmp_path, vocab, AddedToken("<image>", special=True), pad_token="<pad>")
    assert read_prompt(str(folder), text="w5 w6", ids=None).ids == [5, 6]
    assert "'<pad>' (97)" in caplog.text and "'<image>' (98)" in caplog.text
    with pytest.raises(InputError, match=r"ids in \[0, 97\).*98"):
        read_prompt(str(folder), text="w5 <image>", ids=None)


def test_a_tokenizer_with_fewer_tokens_than_rows_is_usual(llama, tmp_path, caplog):
    folder = tokenized(llama, tmp_path, WORDS)
    assert len(read_tokenizer(folder)) < ROWS
    assert "tokenizer" not in caplog.text


@pytest.mark.parametrize("ids", ["5,97", "-1", "5,6,100000", ","])
def test_prompt_ids_outside_the_vocabulary_are_refused_before_a_device_starts(llama, ids):
    with pytest.raises(InputError, match=r"ids in \[0, 97\)|at least one token"):
        read_prompt(str(llama), text=None, ids=ids)
    assert generate(llama, "--prompt-ids", ids).exit_code == 2
