"""From a request to the engine's input: token ids and sampling. Knows no HTTP and no answer shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve_apps.api_error import ApiError
from serve_apps.protocol import ChatRequest, CompletionRequest, GenerationRequest
from splitray.errors import InputError
from splitray.text.chat import chat_text
from splitray.text.ids import text_ids

if TYPE_CHECKING:
    from splitray.runtime.sampling import Sampling

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat answer may fill the context


def completion_prompts(request: CompletionRequest, tokenizer: Any, *, vocab: int) -> list[list[int]]:
    """Token ids of every prompt of a completion request: a string, ids, or a list of either.

    Raises:
        ApiError: 400 if the prompt has another shape, is empty, or holds ids outside the vocabulary.
    """
    prompts = request.prompt if _is_many(request.prompt) else [request.prompt]
    special = request.add_special_tokens is not False
    ids = [
        _text_ids(p, tokenizer, add_special_tokens=special) if isinstance(p, str) else _checked_ids(p, vocab)
        for p in prompts
    ]
    if not ids or not all(ids):
        raise ApiError(400, "prompt: expected at least one token, got an empty prompt", param="prompt")
    return ids


def chat_prompt(request: ChatRequest, tokenizer: Any, *, trust_request_chat_template: bool = False) -> list[int]:
    """Token ids of a dialogue in the model's own chat template, or in the request's where that is trusted.

    Raises:
        ApiError: 400 if the model has no template, the template refuses the dialogue or leaves out its words, or the
            request brings what only a trusted one may.
    """
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(request, name) and not trust_request_chat_template:
            how = "start it with --trust-request-chat-template (serve run: trust_request_chat_template=true)"
            raise ApiError(400, f"{name}: this server does not take it; {how}", param=name,
                           code="unsupported_parameter")  # fmt: skip
    continued = bool(request.continue_final_message)
    try:
        text = chat_text(
            [m.turn for m in request.messages],
            tokenizer,
            template=request.chat_template or None,
            variables=request.chat_template_kwargs,
            add_generation_prompt=not continued
            if request.add_generation_prompt is None
            else request.add_generation_prompt,
            continue_final_message=continued,
        )
    except InputError as error:
        raise ApiError(400, f"{error.what}: {error.actual}; {error.remedy}", param=error.what) from error
    # The template writes the special tokens itself.
    ids = _text_ids(text, tokenizer, param="messages", add_special_tokens=bool(request.add_special_tokens))
    if not ids:
        raise ApiError(400, "messages: expected at least one token, got none", param="messages")
    return ids


def sampling_for(
    request: GenerationRequest, *, num_prompt_tokens: int, context_tokens: int, stop_ids: Sequence[int], seed: int
) -> Sampling:
    """The engine's sampling for one prompt of a request; `seed` serves where the request names none.

    Raises:
        ApiError: 400 with code context_length_exceeded if prompt and answer do not fit, or with the parameter that no
            token can be chosen by.
    """
    from splitray.runtime.sampling import Sampling

    room = context_tokens - num_prompt_tokens
    wanted = request.max_tokens
    if isinstance(request, ChatRequest):
        param, default = "messages", room
        wanted = request.max_completion_tokens or wanted
    else:
        param, default = "prompt", min(room, COMPLETION_MAX_TOKENS)
    if room < (wanted or 1):
        message = (
            f"this model's context is {context_tokens} tokens, but {num_prompt_tokens} of the {param} and "
            f"{wanted or 1} of the answer were asked for; shorten the {param} or lower max_tokens"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    # Greedy is this project's default. A nucleus of no mass still holds the likeliest token: greedy too.
    greedy = request.temperature is None or request.top_p == 0
    try:
        return Sampling(
            max_new_tokens=wanted or default,
            temperature=0.0 if greedy else float(request.temperature or 0.0),
            top_p=float(request.top_p or 1.0),
            seed=(seed if request.seed is None else request.seed) & (2**63 - 1),  # generators want 0 or more
            stop_ids=tuple(sorted(set(stop_ids))),
        )
    except InputError as error:
        raise ApiError(400, str(error), param=error.what) from error


def _is_many(prompt: Any) -> bool:
    return isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt)


def _text_ids(text: str, tokenizer: Any, *, param: str = "prompt", **options: bool) -> list[int]:
    try:
        return text_ids(text, tokenizer, what=param, **options)
    except InputError as error:
        raise ApiError(400, str(error), param=param) from error


def _checked_ids(ids: Any, vocab: int) -> list[int]:
    # bool is an int to isinstance.
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        shapes = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
        raise ApiError(400, f"prompt: expected {shapes}", param="prompt")
    outside = next((i for i in ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise ApiError(400, f"prompt: expected token ids below {vocab}, got {outside}", param="prompt")
    return ids
