"""Files of tokenizers and of generation as people have them: what is wrong is said with the file and what to do."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from families import save_family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from serve_apps.engine_queue import EngineQueue
from serve_apps.service import TextService
from splitray.errors import InputError, ModelError
from splitray.model.reading import read_config
from splitray.model.token_ids import end_ids
from splitray.runtime import launch
from splitray.runtime.generation import read_prompt
from splitray.runtime.launch import launch_engine, needed_tokenizer, read_tokenizer

CODE = "import pathlib; pathlib.Path(__file__).with_name('was_run').touch()\nclass Own: pass\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_family("llama", folder)
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdefgh")}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device starts, nobody is asked, nothing is looked up elsewhere."""

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("it starts a device, reads a terminal or calls somebody")

    class Terminal(io.StringIO):
        read = readline = refuse

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(launch, "Engine", refuse)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def write(model: Path, **files: bytes | None) -> None:
    """Replace files of a model, whose names are given with two underscores for a dot."""
    for name, content in files.items():
        path = model / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def changed(folder: Path, name: str, **values: Any) -> bytes:
    return json.dumps({**json.loads((folder / name).read_bytes()), **values}).encode()


def config(model: Path, **values: Any) -> dict[str, bytes | None]:
    return {"tokenizer_config__json": changed(model, "tokenizer_config.json", **values)}


def core(folder: Path, **values: Any) -> dict[str, bytes | None]:
    return {"tokenizer__json": changed(folder, "tokenizer.json", **values)}


def only(name: str, content: bytes, config: Any = None) -> dict[str, bytes | None]:
    said = json.dumps({"tokenizer_class": config}).encode() if config else None
    return {"tokenizer__json": None, "tokenizer_config__json": said, name: content}


LINES = b"aGVsbG8= 0\nIHdvcmxk 1\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n"
BROKEN: dict[str, tuple[Any, str]] = {
    "cut short": (lambda m: {"tokenizer__json": (m / "tokenizer.json").read_bytes()[:300]}, r"tokenizer.json:\d+: "),
    "empty": (lambda m: {"tokenizer__json": b""}, "tokenizer.json:1: .*JSON"),
    "a list": (lambda m: {"tokenizer__json": b"[]"}, "tokenizer.json: .*JSON object, got list"),
    "no model in it": (lambda m: {"tokenizer__json": b"{}"}, "tokenizer.json: .*Model missing"),
    "other bytes": (lambda m: {"tokenizer__json": bytes(range(256))}, "tokenizer.json:2: .*UTF-8"),
    "a BOM": (lambda m: {"tokenizer__json": b"\xef\xbb\xbf" + (m / "tokenizer.json").read_bytes()},
              "tokenizer.json: .*byte-order mark"),
    "deep": (lambda m: {"tokenizer__json": b"[" * 100_000}, "tokenizer.json: .*nested too deep"),
    "a pointer": (lambda m: {"tokenizer__json": POINTER}, "tokenizer.json: .*Git LFS"),
    "an unknown model": (lambda m: core(m, model={"type": "New"}), "tokenizer.json: .*ModelUntagged"),
    "an unknown version": (lambda m: core(m, version="9"), "tokenizer.json: .*version"),
    "merges of other tokens": (lambda m: core(m, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["q", "zz"]]}),
                               "tokenizer.json: .*out of vocabulary"),
    "a pattern that is none": (lambda m: core(m, pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "tokenizer.json: .*parenthesis"),
    "a panic": (lambda m: core(m, post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
        "special_tokens": {}}), "PanicException"),
    "a config cut short": (lambda m: {"tokenizer_config__json": b'{"eos_token": '}, "tokenizer_config.json:1: .*JSON"),
    "a config that is a number": (lambda m: {"tokenizer_config__json": b"3"}, "tokenizer_config.json: .*got int"),
    "a config with a BOM": (lambda m: {"tokenizer_config__json": b"\xef\xbb\xbf{}"}, "tokenizer_config.json: .*mark"),
    "a class of numbers": (lambda m: config(m, tokenizer_class=3), "tokenizer_config.json: .*AttributeError"),
    "a class of models": (lambda m: config(m, tokenizer_class="LlamaForCausalLM"), "tokenizer_config.json: "),
    "an eos of numbers": (lambda m: config(m, eos_token=3), "tokenizer_config.json: .*eos_token"),
    "templates without names": (lambda m: config(m, chat_template=[{"x": 1}]), "tokenizer_config.json: .*name"),
    "a side that is none": (lambda m: config(m, padding_side="up"), "tokenizer_config.json: .*[Pp]adding side"),
    "a map of special tokens": (lambda m: {"special_tokens_map__json": b"["}, "special_tokens_map.json:1: .*JSON"),
    "added tokens": (lambda m: {"added_tokens__json": b"[1]"}, "added_tokens.json: .*got list"),
    "a template in other bytes": (lambda m: {"chat_template__jinja": b"\n\xe9"}, "chat_template.jinja:2: .*UTF-8"),
    "one of several templates": (lambda m: {"additional_chat_templates/tool__jinja": b"\xff"}, "tool.jinja:1: .*UTF-8"),
    "no vocabulary": (lambda m: only("vocab__json", b'{"a": 0}'), "expected tokenizer.json"),
    "an empty class": (lambda m: only("special_tokens_map__json", b"{}", "LlamaTokenizer"), "a vocabulary.*no tokens"),
    "own code": (lambda m: config(m, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
                 | {"own__py": CODE.encode()}, "tokenizer_config.json: .*code of the model's own.*not run here"),
    "own code elsewhere": (lambda m: config(m, tokenizer_class="Own", auto_map={"AutoTokenizer": ["a/b--o.Own", None]}),
                           "tokenizer_config.json: .*code of the model's own.*a/b--o.Own"),
    "SentencePiece": (lambda m: only("tokenizer__model", b"\x0a\x0b<unk>", "LlamaTokenizer"),
                      "tokenizer.model: .*package sentencepiece.*pip install sentencepiece"),
    "SentencePiece by another name": (lambda m: only("spiece__model", b"\x0a\x0b<unk>", "T5Tokenizer"),
                                      "spiece.model: .*pip install sentencepiece"),
    "tiktoken": (lambda m: only("tokenizer__model", LINES), "tokenizer.model: .*pip install tiktoken"),
    "tiktoken of qwen": (lambda m: only("qwen__tiktoken", LINES), "qwen.tiktoken: .*pip install tiktoken"),
    "a pointer to SentencePiece": (lambda m: only("tokenizer__model", POINTER), "tokenizer.model: .*Git LFS"),
    "tekken": (lambda m: only("tekken__json", b"{}"), "tokenizer"),
    "none": (lambda m: {"tokenizer__json": None, "tokenizer_config__json": None}, "none in"),
}  # fmt: skip


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may have them."""
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("sentencepiece", "tiktoken") else found(name))


@pytest.mark.thin(3)
@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_tokenizer_is_refused_by_its_file_and_ids_still_work(model, caplog, damage) -> None:
    files, said = BROKEN[damage]
    write(model, **files(model))
    with pytest.raises(ModelError, match=said) as refused:
        needed_tokenizer(model)
    assert refused.value.remedy
    for question in (
        lambda: read_prompt(str(model), text="abc", ids=None),
        lambda: launch_engine(model=model, needs_text=True),
        lambda: TextService(EngineQueue(lambda: FakeEngine(tokenizer=None, model_path=str(model))), model_name="m"),
    ):
        with pytest.raises(ModelError, match=said):
            question()
    assert read_tokenizer(model) is None
    assert read_prompt(str(model), text=None, ids="5,6").ids == [5, 6]
    assert damage == "none" or str(model) in caplog.text
    assert not (model / "was_run").exists()


@pytest.mark.parametrize("kind", ["a folder", "a loop", "a pipe"])
def test_what_is_no_file_is_refused(model, kind) -> None:
    path = model / "tokenizer.json"
    path.unlink()
    {"a folder": path.mkdir, "a loop": lambda: path.symlink_to(path), "a pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ModelError, match="tokenizer.json: expected a (plain|readable) file"):
        needed_tokenizer(model)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_tokenizer_that_transformers_has_is_not_run(model, where) -> None:
    own = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"], "AutoModelForCausalLM": "own.Own"}
    write(model, **{where.replace(".", "__"): changed(model, where, auto_map=own), "own__py": CODE.encode()})
    try:
        assert read_prompt(str(model), text="abc", ids=None).ids == [0, 1, 2]
    except ModelError as refused:
        assert "not run here" in refused.remedy
    assert not (model / "was_run").exists()


def test_a_text_that_a_tokenizer_has_no_ids_for_is_bad_input(model) -> None:
    write(model, **core(model, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}))
    for text in ("a \ud800", "zzz"):
        with pytest.raises(InputError, match="--prompt: expected text"):
            read_prompt(str(model), text=text, ids=None)


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        (b'{"eos_token_id": 1}', [1]),
        (b'{"eos_token_id": [1, 7]}', [1, 7]),
        (b'{"eos_token_id": -1}', [-1]),
        (b'{"eos_token_id": null}', []),
        (b"{}", []),
        (b'{"text_config": 3, "temperature": "warm", "no_such_key": [1]}', []),
        (b'{"eos_token_id": ', None),
        (b"", None),
        (b'\xef\xbb\xbf{"eos_token_id": 1}', None),
        ('{"eos_token_id": 1}'.encode("utf-16"), None),
        (b"[1]", None),
        (b"3", None),
        (b'"x"', None),
        (b"null", None),
        (b"[" * 100_000, None),
        (b'{"eos_token_id": "</s>"}', None),
        (b'{"eos_token_id": "1"}', None),
        (b'{"eos_token_id": 5000}', None),
        (b'{"eos_token_id": ' + b"9" * 5000 + b"}", None),
        (b'{"eos_token_id": 1.0}', None),
        (b'{"eos_token_id": NaN}', None),
        (b'{"eos_token_id": true}', None),
        (b'{"eos_token_id": [[1]]}', None),
        (b'{"eos_token_id": "\\ud800"}', None),
        (b'{"max_new_tokens": -1}', None),
        (b'{"cache_implementation": "none such"}', None),
        (b'{"watermarking_config": 3}', None),
        (b'{"eos_token_id": 1, "eos_token_id": 2}', None),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_a_generation_config_is_taken_as_transformers_takes_it_or_refused(model, content, ends) -> None:
    write(model, generation_config__json=content)
    if ends is None:
        for question in (lambda: read_config(model), lambda: launch_engine(model=model)):
            with pytest.raises(ModelError, match="generation_config.json") as refused:
                question()
            assert refused.value.remedy
        return
    named = GenerationConfig.from_pretrained(model).eos_token_id
    assert ends == (named if isinstance(named, list) else [] if named is None else [named])
    read_config(model)
    assert end_ids(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))) == ends


def test_a_generation_config_that_is_a_folder_is_none_as_for_transformers(model) -> None:
    write(model, generation_config__json=None)
    (model / "generation_config.json").mkdir()
    read_config(model)
    with pytest.raises(OSError):
        GenerationConfig.from_pretrained(model)
