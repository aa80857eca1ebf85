"""Requests to text: prompts, engine and text stream put together. Knows no routes and no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from serve_apps.api_error import ApiError, as_api_error
from serve_apps.engine_queue import EngineQueue
from serve_apps.prompts import chat_prompt, completion_prompts, sampling_for
from serve_apps.protocol import ChatRequest, CompletionRequest
from serve_apps.replies import DONE, ChatReply, CompletionReply, FinishReason, Usage, event
from splitray.text.decoding import Decoding
from splitray.text.stream import TextStream

if TYPE_CHECKING:
    from splitray.runtime.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt of a request."""

    prompt_ids: list[int]
    sampling: Sampling
    text: TextStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of choice `index`; the last one of a choice has a finish reason and the count of new ids."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    num_tokens: int = 0


class TextService:
    """Serves one model under one name."""

    def __init__(
        self, queue: EngineQueue, *, model_name: str, seed: int = 0, trust_request_chat_template: bool = False
    ) -> None:
        """`seed` starts the series of seeds for requests that sample and name none.

        `trust_request_chat_template`: a request may bring a chat template, and variables for one.

        Raises:
            ModelError: the model has no tokenizer that can be used.
        """
        from splitray.model.token_ids import end_ids
        from splitray.runtime.launch import needed_tokenizer

        self.model_name = model_name
        self.queue = queue
        self._tokenizer = queue.engine.tokenizer
        if self._tokenizer is None:
            self._tokenizer = needed_tokenizer(queue.engine.model_path)  # says what is wrong with it
        self._end_ids = end_ids(queue.engine.model_path, self._tokenizer)
        self._trust = trust_request_chat_template
        self._seeds = Random(seed)
        self._decodings = {skip: Decoding(self._tokenizer, skip_special_tokens=skip) for skip in (True, False)}

    def jobs(self, request: CompletionRequest | ChatRequest) -> list[Job]:
        """Check a request and make it the engine's input, one job a choice.

        Raises:
            ApiError: the request is refused.
        """
        self.check_model(request.model)
        request.check()
        if isinstance(request, ChatRequest):
            prompts = [chat_prompt(request, self._tokenizer, trust_request_chat_template=self._trust)]
        else:
            prompts = completion_prompts(request, self._tokenizer, vocab=self.queue.engine.arch.vocab)
        return [self._job(request, ids) for ids in prompts]

    def _job(self, request: CompletionRequest | ChatRequest, prompt_ids: list[int]) -> Job:
        arch = self.queue.engine.arch
        sampling = sampling_for(
            request,
            num_prompt_tokens=len(prompt_ids),
            context_tokens=arch.context_tokens,
            stop_ids=self._end_ids,
            seed=self._seeds.getrandbits(63),
        )
        text = TextStream(
            self._decodings[request.skip_special_tokens is not False],
            prompt_ids if request.goes_on else [],
            stops=request.stop_strings,
            end_ids=sampling.stop_ids,
            include_end=bool(request.include_stop_str_in_output),
        )
        return Job(prompt_ids=prompt_ids, sampling=sampling, text=text)

    def check_model(self, name: str) -> None:
        """Refuse any other model's name.

        Raises:
            ApiError: 404 with code model_not_found.
        """
        if name != self.model_name:
            message = f"the model {name!r} does not exist here; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def reply(self, request: CompletionRequest | ChatRequest) -> CompletionReply:
        """The empty answer to a request."""
        kind = ChatReply if isinstance(request, ChatRequest) else CompletionReply
        return kind(model=self.model_name, include_usage=request.include_usage)

    async def pieces(self, jobs: Sequence[Job]) -> AsyncGenerator[Piece, None]:
        """The text of all jobs, one after the other; each takes its own turn in the queue."""
        for index, job in enumerate(jobs):
            text, num_tokens, ended = job.text, 0, False
            async with aclosing(self.queue.stream(job.prompt_ids, job.sampling)) as tokens:
                async for token_id in tokens:
                    num_tokens += 1
                    ended = token_id in job.sampling.stop_ids  # the engine ends there by itself
                    if new := text.push(token_id):
                        yield Piece(index=index, text=new)
                    if text.stopped:
                        break
            rest = text.flush()
            reason: FinishReason = "stop" if ended or text.stopped else "length"
            yield Piece(index=index, text=rest, finish_reason=reason, num_tokens=num_tokens)


async def whole(reply: CompletionReply, jobs: Sequence[Job], pieces: AsyncGenerator[Piece, None]) -> Any:
    """The body of an answer that does not stream."""
    texts: list[str] = [""] * len(jobs)
    choices: list[tuple[str, FinishReason]] = []
    num_tokens = 0
    async for piece in pieces:
        texts[piece.index] += piece.text
        num_tokens += piece.num_tokens
        if piece.finish_reason:
            choices.append((texts[piece.index], piece.finish_reason))
    return reply.whole(choices, usage_of(jobs, num_tokens))


async def events(
    reply: CompletionReply, jobs: Sequence[Job], first: Piece, rest: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    """The events of a streamed answer. An error now comes after the status line, so it is an event too."""
    num_tokens, opened = 0, -1
    try:
        async with aclosing(rest):
            async for piece in _chain(first, rest):
                if piece.index > opened:
                    opened = piece.index
                    for opening in reply.opening(piece.index):
                        yield opening
                if piece.text:
                    yield reply.piece(piece.index, piece.text)
                num_tokens += piece.num_tokens
                if piece.finish_reason:
                    yield reply.closing(piece.index, piece.finish_reason)
    except Exception as error:  # a boundary: the client must learn it
        yield event(as_api_error(error).body)
        return
    if reply.include_usage:
        yield reply.usage(usage_of(jobs, num_tokens))
    yield DONE


def usage_of(jobs: Sequence[Job], num_tokens: int) -> Usage:
    """The token counts of a request."""
    return Usage(prompt_tokens=sum(len(j.prompt_ids) for j in jobs), completion_tokens=num_tokens)


async def _chain(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece
