"""The tokenizer of a model's folder, as transformers reads it from its files alone, or what is wrong with them.

No code of the folder is run, nobody is asked and nothing is looked up elsewhere.
"""

import importlib.util
import os
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from splitray.errors import InputError, TokenizerError
from splitray.model.folder import gguf_parts, refuse_pointer
from splitray.model.gguf_file import GgufFile
from splitray.model.gguf_tokenizer import has_tokens, tokenizer_of
from splitray.text.ids import fault_of_tokenizers
from splitray.user_file import UserFile

_FILE = re.compile(r"token|tekken|vocab|merges|spiece|sentencepiece|bpe|spm|\.model$", re.IGNORECASE)
_DOCUMENTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_MOST_BYTES = 1_000_000_000  # transformers has read as much
_READ = "a tokenizer that transformers reads"
_BUILT_IN = "a tokenizer that transformers has built in"
_AGAIN = "copy it again from where the model came from, or use --prompt-ids with `splitray generate`"
_CONVERT = "where that works, run AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), which writes tokenizer.json"


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file of a tokenizer, or a GGUF file with one: without it transformers makes an empty one."""
    if gguf_parts(folder):
        return has_tokens(GgufFile(folder))
    return any(_FILE.search(path.name) for path in folder.glob("*"))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that has files of one.

    Raises:
        ModelError: they cannot be used; says which one and why.
    """
    if gguf_parts(folder):
        return tokenizer_of(GgufFile(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer.decode(tokenizer("")["input_ids"])  # some faults show only in use
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except BaseException as error:  # a boundary: the files are anybody's
        if not isinstance(error, Exception) and not fault_of_tokenizers(error):
            raise
        raise _told(folder, error) from error
    if not known:
        raise _file(folder).wrong("a vocabulary, in tokenizer.json or a file of its own", "no tokens")
    return tokenizer


def _told(folder: Path, error: BaseException) -> InputError:
    """What to say of an error: the file that is damaged, the package or the code that is missing."""
    said = " ".join(str(error).split())
    try:
        documents = {name: _document(folder / name) for name in _DOCUMENTS if os.path.lexists(folder / name)}
        vocabularies = sorted((*folder.glob("*.model"), *folder.glob("*.tiktoken")))
        for path in vocabularies:
            refuse_pointer(path)
        for path in (*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
            _file(path).text()
    except InputError as damaged:
        return TokenizerError(damaged.what, expected=damaged.expected, actual=damaged.actual, remedy=damaged.remedy)
    config = documents.get("tokenizer_config.json", {})
    if "auto_map" in config and "trust_remote_code" in said:
        actual = f"code of the model's own (auto_map: {config['auto_map']})"
        remedy = f"code that comes with a model is not run here: {_CONVERT}"
        return _file(folder / "tokenizer_config.json").wrong(_BUILT_IN, actual, remedy=remedy)
    if "tokenizer.json" in documents:
        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as damaged:  # tokenizers has no other class
            return _file(folder / "tokenizer.json").wrong(_READ, damaged)
        beside = [name for name in documents if name != "tokenizer.json"]
        at_fault = " or ".join(beside) or "tokenizer.json"
        remedy = f"correct {at_fault}, or {_AGAIN}"
        return _file(folder / at_fault).wrong(_READ, f"{type(error).__name__}: {said}", remedy=remedy)
    for path in vocabularies:
        if package := _missing_package(path):
            remedy = f"install it (pip install {package}), or {_CONVERT}"
            return _file(path).wrong(f"the package {package}, which reads it", "it is not installed", remedy=remedy)
        return _file(path).wrong(_READ, said)
    return _file(folder).wrong("tokenizer.json, or another vocabulary that transformers reads", said)


def _file(path: Path) -> UserFile:
    return UserFile(path, "tokenizer", _AGAIN, TokenizerError)


def _document(path: Path) -> dict[str, Any]:
    file = _file(path)
    with file.opened() as raw:
        first = raw.read(len(BOM_UTF8))
    refuse_pointer(path)
    if first == BOM_UTF8:
        remedy = "save it in UTF-8 without the mark"
        raise file.wrong("a document that transformers reads", "a byte-order mark at its beginning", remedy=remedy)
    document = file.json(_MOST_BYTES, _MOST_BYTES)
    if not isinstance(document, dict):
        raise file.wrong("a JSON object", type(document).__name__)
    return document


def _missing_package(vocabulary: Path) -> str | None:
    """A package that is needed to read a vocabulary file, and not installed."""
    with open(vocabulary, "rb") as file:
        first = file.readline(1000).split()
    as_lines = len(first) == 2 and first[1].isdigit()
    packages = ("tiktoken",) if as_lines else ("sentencepiece", "protobuf")
    modules = {"protobuf": "google.protobuf"}
    return next((p for p in packages if importlib.util.find_spec(modules.get(p, p)) is None), None)
