"""What an OpenAI client may ask; knows no engine, no tokenizer and no Ray."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.api_error import ApiError

# Fields that cannot change the generated text, so any value is accepted and ignored.
TOLERATED = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",  # transformers puts none
    "store",
    "user",
)
# Fields that are not offered, with the values that ask for nothing. Null is neutral for every field.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),  # and not 0, which asks for the log-probabilities of the chosen tokens
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}


class StreamOptions(BaseModel):
    """`include_usage` asks for one more chunk; other options concern padding and are ignored."""

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What completions and chat have in common. Null means default everywhere."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end the text and are not part of it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def goes_on(self) -> bool:
        """Whether the answer goes on with the text of the prompt, spaces and begun characters included."""
        return True

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse what would change the answer in a way that is not offered.

        Raises:
            ApiError: 400, naming the parameter.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in TOLERATED or _is_one_of(value, NEUTRAL.get(name, ())):
                continue
            wanted = " or ".join(json.dumps(v) for v in (None, *NEUTRAL.get(name, ())))
            known = f"only {wanted} is" if name in NEUTRAL else "the parameter is not"
            raise ApiError(
                400,
                f"{name}: {known} supported here, got {json.dumps(value)[:80]}",
                param=name,
                code="unsupported_parameter",
            )
        if len(self.stop_strings) > 4 or "" in self.stop_strings:
            raise ApiError(400, "stop: expected up to 4 strings, none of them empty", param="stop")
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options: only allowed with stream: true", param="stream_options")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. prompts.py tells the four shapes of `prompt` apart, for one message."""

    prompt: Any


class TextPart(BaseModel):
    """One part of a message; images, audio and files are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of the dialogue."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """What a chat template gets of it; `developer` is OpenAI's newer word for `system`, templates know the old."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(include={"content", "name"}, exclude_none=True), "role": role}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. What concerns the template is as vLLM has it."""

    messages: list[ChatMessage]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def goes_on(self) -> bool:
        """A message is a text of its own, decoded without the prompt before it, unless it was begun there."""
        return bool(self.continue_final_message)

    def check(self) -> None:
        """Also refuse what a message carries besides text: clients send back nulls, tool calls are not ours.

        Raises:
            ApiError: 400, naming the parameter.
        """
        super().check()
        if not self.messages:
            raise ApiError(400, "messages: expected at least one message", param="messages")
        for i, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value is not None and value != []:
                    where = f"messages[{i}].{name}"
                    raise ApiError(400, f"{where}: not supported here", param=where, code="unsupported_parameter")


def _is_one_of(value: Any, neutral: Sequence[Any]) -> bool:
    # JSON tells true from 1 and false from 0, Python's == does not.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)
