"""The two OpenAI answer shapes, whole and in chunks; knows nothing of how the text comes about."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def body(self) -> dict[str, int]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class CompletionReply:
    """`text_completion`, whole or in chunks: the same id and time in all parts of one answer."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, texts: Sequence[tuple[str, FinishReason]], usage: Usage) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self.choice(i, text, reason) for i, (text, reason) in enumerate(texts)]
        return {**self._head(self.whole_object), "choices": choices, "usage": usage.body}

    def choice(self, index: int, text: str, reason: FinishReason) -> dict[str, Any]:
        """One whole choice."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> list[str]:
        """What a stream says before the first text of a choice."""
        return []

    def piece(self, index: int, text: str) -> str:
        """One event with new text."""
        return self._event([{"index": index, "text": text, "logprobs": None, "finish_reason": None}])

    def closing(self, index: int, reason: FinishReason) -> str:
        """The last event of a choice."""
        return self._event([{"index": index, "text": "", "logprobs": None, "finish_reason": reason}])

    def usage(self, usage: Usage) -> str:
        """The event that `include_usage` asks for."""
        return self._event([], usage)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        chunk = {**self._head(self.chunk_object), "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage.body if usage else None
        return event(chunk)


@dataclass(frozen=True, kw_only=True)
class ChatReply(CompletionReply):
    """`chat.completion` and `chat.completion.chunk`."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: FinishReason) -> dict[str, Any]:
        """One whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> list[str]:
        """The delta that names the role."""
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, text: str) -> str:
        """One event with new text."""
        return self._delta(index, {"content": text})

    def closing(self, index: int, reason: FinishReason) -> str:
        """The last event of a choice: an empty delta."""
        return self._delta(index, {}, reason)

    def _delta(self, index: int, delta: dict[str, str], reason: FinishReason | None = None) -> str:
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}])


def event(data: dict[str, Any]) -> str:
    """One server-sent event; JSON in ASCII holds no line break that could end it early."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
