"""One prompt through an engine: a text or ids become the prompt, new ids become text and the run's document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from splitray.errors import InputError
from splitray.model.checked import check_weights
from splitray.model.folder import has_weights
from splitray.model.reading import read_config
from splitray.model.token_ids import end_ids
from splitray.runtime.engine.session import check_ids
from splitray.runtime.launch import model_path, needed_tokenizer, read_tokenizer
from splitray.text.decoding import Decoding
from splitray.text.ids import text_ids
from splitray.text.stream import TextStream

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine
    from splitray.runtime.sampling import Sampling

Document = dict[str, Any]
_RUN_KEYS = ("ttft_s", "tpot_s")
_TRAFFIC_KEYS = ("messages_per_token", "bytes_per_token", "wire_bytes_per_token", "driver_bytes_per_token")
_ID = re.compile("[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids to continue, and those that end the answer."""

    ids: list[int]
    stop_ids: tuple[int, ...]


def read_prompt(model: str, *, text: str | None, ids: str | None) -> Prompt:
    """A prompt as a user gives it: a text, or ids with commas between them.

    Raises:
        InputError: not exactly one of the two is given, the ids are no numbers, there are none, or the model has no
            token of one; a text has no tokenizer.
        ModelError: there is no such model.
    """
    if (text is None) == (ids is None):
        expected, remedy = "either --prompt or --prompt-ids", 'give one of them, for example --prompt "The list of"'
        raise InputError("prompt", expected=expected, actual="neither" if text is None else "both", remedy=remedy)
    vocab = checked_vocab(model)  # a wrong path must not look like a missing tokenizer
    tokenizer = read_tokenizer(model) if text is None else needed_tokenizer(model)
    prompt = _prompt_ids(tokenizer, text, ids)
    check_ids(prompt, vocab)
    return Prompt(prompt, stop_ids_of(model, tokenizer))


def checked_vocab(model: str) -> int:
    """The rows of a model's vocabulary, after a look at its files: before Ray is started, too.

    Raises:
        ModelError: there is no such model, or its weights cannot be used.
    """
    folder = model_path(model)
    vocab: int = read_config(folder).vocab_size
    if has_weights(folder):
        check_weights(folder)
    return vocab


def stop_ids_of(model: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer, in order; a model may have no tokenizer."""
    return tuple(sorted(set(end_ids(str(model_path(model)), tokenizer or SimpleNamespace(eos_token_id=None)))))


def _prompt_ids(tokenizer: Any, text: str | None, ids: str | None) -> list[int]:
    if ids is not None:
        parts = [part.strip() for part in ids.split(",") if part.strip()]
        if not all(map(_ID.fullmatch, parts)):
            expected, remedy = "whole numbers with commas between them", "write for example --prompt-ids 1,2,3"
            raise InputError("--prompt-ids", expected=expected, actual=repr(ids), remedy=remedy)
        return [int(part) for part in parts]
    return text_ids(text or "", tokenizer, what="--prompt")


def continue_prompt(
    engine: Engine,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    tell: Callable[[str], None],
    skip_special_tokens: bool = True,
    shared_process: bool = False,
) -> Document:
    """Generate, and give the run's document.

    `tell` is called for every token with the text that it made certain, perhaps none, and once with the rest; with ids
    where there is no tokenizer. The text goes on from the prompt's. `shared_process`: the devices are threads, so that
    memory cannot be told apart.

    Raises:
        InputError: the engine refuses the prompt.
        DeviceLost: a device died.
    """
    stream = None
    if engine.tokenizer:
        stream = TextStream(Decoding(engine.tokenizer, skip_special_tokens=skip_special_tokens), prompt_ids)
    token_ids: list[int] = []
    pieces: list[str] = []
    for token_id in engine.stream(prompt_ids, sampling):
        token_ids.append(token_id)
        pieces.append(stream.push(token_id) if stream else f"{token_id} ")
        tell(pieces[-1])
    if stream:
        pieces.append(stream.flush())
        tell(pieces[-1])
    assert engine.report is not None, "a finished run has a report"
    stats = engine.stats()
    return run_document(
        token_ids=token_ids,
        text="".join(pieces) if stream else None,
        run=asdict(engine.report),
        exchanges_per_token=engine.route.exchanges_per_token,
        epoch=engine.epoch,
        devices={d: stats[d] for d in engine.topology.ids if d in stats},
        shared_process=shared_process,
    )


def run_document(
    *,
    token_ids: Sequence[int],
    text: str | None,
    run: Mapping[str, Any],
    exchanges_per_token: int,
    epoch: int,
    devices: Mapping[str, Mapping[str, Any]],
    shared_process: bool = False,
) -> Document:
    """What `splitray generate --json` prints.

    `token_ids` are the new ones only, `run` has the fields of the engine's RunReport, `devices` its stats.
    `shared_process`: the devices are threads, so that memory cannot be told apart.
    """
    return {
        "token_ids": list(token_ids),
        "text": text,
        **{key: run[key] for key in _RUN_KEYS},
        "exchanges_per_token": exchanges_per_token,
        **{key: run[key] for key in _TRAFFIC_KEYS},
        "epoch": epoch,
        "devices": {
            device: {
                "weight_bytes": stats["weight_bytes"],
                "kv_bytes": run["kv_bytes"].get(device, 0),  # the run has freed its KV by now
                "checkpoint_bytes_read": stats["checkpoint_bytes_read"],
                "rss_anon_bytes": None if shared_process else stats["rss_anon_bytes"],
            }
            for device, stats in devices.items()
        },
    }
