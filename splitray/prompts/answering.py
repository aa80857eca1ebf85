"""Prompts of a file to answers: what an engine is given for each, and what is written of it. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splitray.errors import InputError, TokenizerError, Unsampled
from splitray.runtime.engine.session import check_prompt
from splitray.text.chat import chat_text
from splitray.text.decoding import Decoding
from splitray.text.ids import text_ids
from splitray.text.stream import TextStream

if TYPE_CHECKING:
    from splitray.prompts.prompt_line import PromptLine
    from splitray.prompts.prompts_file import Entry
    from splitray.runtime.engine.engine import Engine
    from splitray.runtime.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as the engine takes it; without a tokenizer there is no text."""

    prompt_ids: list[int]
    sampling: Sampling
    text: TextStream | None


class RequestMaker:
    """Makes requests of prompts; what a prompt leaves open is as the command says."""

    def __init__(self, engine: Engine, sampling: Sampling, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._arch = engine.tokenizer, engine.arch
        self._sampling, self._skip = sampling, skip_special_tokens
        self._decodings: dict[bool, Decoding] = {}

    def of(self, prompt: PromptLine | InputError) -> Request:
        """The request of a prompt.

        Raises:
            InputError: it is none, is empty, has tokens that the model does not know or too many of them, or the
                template or the sampler refuses what is asked for.
        """
        if isinstance(prompt, InputError):
            raise prompt
        sampling = replace(self._sampling, **prompt.own_sampling)
        ids = self._ids(prompt)
        check_prompt(ids, sampling.max_new_tokens, self._arch)
        return Request(prompt_ids=ids, sampling=sampling, text=self._text(prompt, ids))

    def _ids(self, prompt: PromptLine) -> list[int]:
        said = prompt.prompt if prompt.prompt_ids is None else prompt.prompt_ids
        if isinstance(said, list):
            return said
        if self._tokenizer is None:
            raise TokenizerError("prompt", expected="token ids: the model has no tokenizer that can be used here",
                                 actual="a text", remedy="give prompt_ids")  # fmt: skip
        if prompt.messages is None:
            return text_ids(said or "", self._tokenizer, add_special_tokens=prompt.add_special_tokens is not False)
        continued = bool(prompt.continue_final_message)
        text = chat_text(
            [turn.said for turn in prompt.messages],
            self._tokenizer,
            variables=prompt.chat_template_kwargs,
            add_generation_prompt=not continued
            if prompt.add_generation_prompt is None
            else prompt.add_generation_prompt,
            continue_final_message=continued,
        )
        # The template writes the special tokens itself.
        return text_ids(text, self._tokenizer, what="messages", add_special_tokens=bool(prompt.add_special_tokens))

    def _text(self, prompt: PromptLine, ids: list[int]) -> TextStream | None:
        if self._tokenizer is None:
            if prompt.stop_strings:
                raise TokenizerError("stop", expected="a model with a tokenizer", actual="none", remedy="leave it out")
            return None
        skip = self._skip if prompt.skip_special_tokens is None else prompt.skip_special_tokens
        if skip not in self._decodings:
            self._decodings[skip] = Decoding(self._tokenizer, skip_special_tokens=skip)
        goes_on = prompt.messages is None or prompt.continue_final_message
        return TextStream(self._decodings[skip], ids if goes_on else [], stops=prompt.stop_strings,
                          include_end=bool(prompt.include_stop_str_in_output))  # fmt: skip


def answers(
    engine: Engine, entries: Iterable[Entry], requests: RequestMaker, came: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """The line of each entry, in their order: the one place where requests are handed to the engine.

    One is begun when the one before has ended. `came` is called for every token.

    Raises:
        DeviceLost: a device died, and nothing could be done about it.
    """
    for entry in entries:
        head = {"index": entry.index} | ({} if entry.id is None else {"id": entry.id})
        try:
            request = requests.of(entry.prompt)
            completion = _completed(engine, request, came)
        except (InputError, Unsampled) as error:
            yield {**head, "error": {"type": type(error).__name__, "message": str(error), "line": entry.line}}
        else:
            yield {**head, **completion}


def _completed(engine: Engine, request: Request, came: Callable[[], None]) -> dict[str, Any]:
    text, token_ids, pieces = request.text, list[int](), list[str]()
    with closing(engine.stream(request.prompt_ids, request.sampling)) as tokens:  # type: ignore[type-var]
        for token_id in tokens:
            came()
            token_ids.append(token_id)
            if text is not None:
                pieces.append(text.push(token_id))
                if text.stopped:
                    break
    if text is not None:
        pieces.append(text.flush())
    ended = token_ids[-1] in request.sampling.stop_ids or (text is not None and text.stopped)
    read, new = len(request.prompt_ids), len(token_ids)
    return {
        "text": None if text is None else "".join(pieces),
        "token_ids": token_ids,
        "finish_reason": "stop" if ended else "length",
        "usage": {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new},
    }
