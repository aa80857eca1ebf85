"""Token ids that a model's files name, against the rows of its vocabulary. Knows no weights and no devices."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from splitray.errors import ModelError
from splitray.model.config import whole_config
from splitray.model.folder import gguf_parts, json_values, model_folder
from splitray.model.layer_kinds import FAILURES

logger = logging.getLogger(__name__)
_NAMED = ("eos_token_id", "bos_token_id", "pad_token_id")
_GENERATION = "generation_config.json"


def check_token_ids(model: str | Path, config: PretrainedConfig) -> None:
    """Refuse an end, a start or a padding that is no token of the model.

    A number below zero stands for none, as some files have it. What a family has by default says nothing of a model:
    configs of small models keep it, and transformers runs them.

    Args:
        model: its folder, or its GGUF file.
        config: of its text decoder.

    Raises:
        ModelError: a file names an id that is not in the vocabulary, or transformers does not read the generation
            config.
    """
    folder = model_folder(model)
    files = {n: json_values(folder, n) for n in ("config.json", _GENERATION) if (folder / n).is_file()}
    files = files or {folder.name: {n: getattr(config, n, None) for n in _NAMED}}
    for file, values in files.items():
        for part in (values, _inner(values)):
            for name in _NAMED:
                _check(f"model {model}: {name} in {file}", part.get(name), config, name)
    if _GENERATION not in files:
        return
    try:
        GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (*FAILURES, OSError) as error:
        remedy = "correct it, or move it away: then the ends are those of config.json"
        raise ModelError(f"model {model}: {_GENERATION}", expected="a generation config that transformers reads",
                         actual=" ".join(str(error).split()), remedy=remedy) from error  # fmt: skip


def end_ids(model: str | Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the checkpoint's own, as `generate()` reads them, and the tokenizer's.

    A chat model may end its turn with another token than the tokenizer's end of sequence. `check_token_ids` comes
    before.
    """
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    named: Any = None
    if gguf_parts(model):
        named = whole_config(model).eos_token_id
    elif file := next((n for n in (_GENERATION, "config.json") if (Path(model) / n).is_file()), None):
        values = json_values(Path(model), file)
        named = values.get("eos_token_id", _inner(values).get("eos_token_id"))
    return [*ids, *(named if isinstance(named, list) else [] if named is None else [named])]


def _inner(values: dict[str, Any]) -> dict[str, Any]:
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _check(what: str, value: Any, config: PretrainedConfig, name: str) -> None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise ModelError(what, expected="a token id, or a list of some", actual=repr(value), remedy="correct it")
    beyond = [i for i in ids if i >= config.vocab_size]
    if not beyond:
        return
    expected = f"ids in [0, {config.vocab_size}), the vocabulary of config.json"
    if value == _default(type(config), name):
        logger.warning("%s: expected %s, got the default of %s, %s; no token is that one", what, expected,
                       config.model_type, value)  # fmt: skip
        return
    raise ModelError(what, expected=expected, actual=", ".join(map(str, beyond)),
                     remedy="correct it, or use the files that belong to these weights")  # fmt: skip


def _default(family: type[PretrainedConfig], name: str) -> Any:
    with contextlib.suppress(*FAILURES):  # some have no config without values
        return getattr(family(), name, None)
    return None


def check_tokenizer(model: str | Path, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that turns plain texts into ids for which the model has no row.

    Fewer ids than rows are usual, and so are a few markers past them that no plain text has (padding, images): those
    are named, and a prompt that has one is refused when it comes.

    Args:
        model: its folder.
        tokenizer: the one beside its weights.
        rows: of its embedding.

    Raises:
        ModelError: ordinary tokens, the end or the start are beyond the last row.
    """
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    markers = {
        *tokenizer.all_special_ids,
        *(i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special),
    }
    markers -= {tokenizer.eos_token_id, tokenizer.bos_token_id}
    some = ", ".join(f"{beyond[i]!r} ({i})" for i in sorted(beyond, key=lambda i: (i in markers, i))[:3])
    some += f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    if set(beyond) <= markers:
        logger.warning("tokenizer of %s: the model has no rows for %s, which no prompt may have", model, some)
        return
    remedy = f"save the model after resize_token_embeddings({max(beyond) + 1}), "
    remedy += "or use the tokenizer that belongs to these weights"
    raise ModelError(f"tokenizer of {model}", expected=f"ids in [0, {rows}), the vocabulary of config.json",
                     actual=some, remedy=remedy)  # fmt: skip
