"""Any bytes in the files of a tokenizer, in a template and in a generation config give a value or an `InputError`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import CHAT_TEMPLATE, byte_tokenizer
from families import save_family
from hypothesis import HealthCheck, given, settings
from test_readers_fuzz import contents

from splitray.errors import InputError
from splitray.model.token_ids import check_token_ids, end_ids
from splitray.model.tokenizer import load_tokenizer
from splitray.text.chat import chat_text
from splitray.text.ids import text_ids

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]
GENERATION = {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 0, "temperature": 0.6, "do_sample": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_family("llama", folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "extra_special_tokens": ["<|im_end|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 1}))
    return folder


def tokenizer(folder: Path) -> None:
    found = load_tokenizer(folder)
    ids = text_ids("the cat é", found)
    assert all(type(i) is int for i in ids)
    if found.chat_template:
        chat_text(MESSAGES, found)


def generation(folder: Path) -> None:
    check_token_ids(folder, SimpleNamespace(vocab_size=97, model_type="llama"))  # type: ignore[arg-type]
    assert all(type(i) is int for i in end_ids(folder, SimpleNamespace(eos_token_id=None)))


FILES: dict[str, Callable[[Path], None]] = {
    "generation_config.json": generation,
    "tokenizer.json": tokenizer,
    "tokenizer_config.json": tokenizer,
    "special_tokens_map.json": tokenizer,
    "added_tokens.json": tokenizer,
    "chat_template.jinja": tokenizer,
}


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", FILES)
def test_any_bytes_give_a_value_or_an_input_error(whole: Path, tmp_path: Path, name: str, examples: int) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    if name in ("special_tokens_map.json", "added_tokens.json"):  # read where the config says nothing of added tokens
        (folder / "tokenizer_config.json").write_text("{}")
    valid = CHAT_TEMPLATE.encode() if name == "chat_template.jinja" else (folder / name).read_bytes()
    (folder / name).write_bytes(valid)
    FILES[name](folder)

    @settings(max_examples=examples, derandomize=True, database=None, deadline=timedelta(seconds=20),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(contents(valid))
    def holds(content: bytes) -> None:
        (folder / name).write_bytes(content)
        try:
            FILES[name](folder)
        except InputError as error:
            assert len(str(error)) < 10_000

    holds()
