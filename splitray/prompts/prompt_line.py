"""What one line of a prompts file may ask for: the names are those of the OpenAI API. Knows no tokenizer, no engine."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from splitray.errors import InputError, did_you_mean
from splitray.runtime.wire.packing import Packable
from splitray.user_file import UserFile

MOST_BYTES = 20_000_000  # of a line
_MOST_STOPS = 4
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_OF_DIALOGUES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TurnPart(Packable):
    """One part of a message; only text is offered."""

    type: Literal["text"]
    text: str


class Turn(Packable):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TurnPart]
    name: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What a chat template gets of it; `developer` is OpenAI's newer word for `system`, templates know the old."""
        said = {k: v for k, v in msgspec.to_builtins(self).items() if v is not None}
        return {**said, "role": "system" if self.role == "developer" else self.role}


class PromptLine(Packable):
    """One prompt, and what is asked of its answer; None: as the command says."""

    id: str | int | None = None
    prompt: str | list[int] | None = None
    prompt_ids: list[int] | None = None
    messages: list[Turn] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def stop_strings(self) -> Sequence[str]:
        """The strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def own_sampling(self) -> dict[str, Any]:
        """The fields of a `Sampling` that it decides by itself."""
        asked = {name: getattr(self, name) for name in _SAMPLING}
        asked["max_new_tokens"] = self.max_completion_tokens or self.max_tokens
        return {name: value for name, value in asked.items() if value is not None}

    def check(self) -> None:
        """Refuse what no type can tell.

        Raises:
            InputError: there is not exactly one prompt, a stop is empty or there are too many, or what belongs to a
                dialogue stands beside another prompt.
        """
        given = [name for name in ("prompt", "prompt_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError("prompt", expected="one of prompt, prompt_ids and messages",
                             actual=" and ".join(given) or "none", remedy="give one of them")  # fmt: skip
        if self.messages == []:
            raise InputError("messages", expected="at least one", actual="none", remedy="write one")
        if len(self.stop_strings) > _MOST_STOPS or "" in self.stop_strings:
            raise InputError("stop", expected=f"up to {_MOST_STOPS} strings, none of them empty",
                             actual=self.stop_strings, remedy="correct stop")  # fmt: skip
        if self.messages is None and (odd := [n for n in _OF_DIALOGUES if getattr(self, n) is not None]):
            raise InputError(odd[0], expected="messages with it", actual=given[0], remedy="leave it out")


Id = str | int | None


def read_line(file: UserFile, number: int, raw: bytes) -> tuple[Id, PromptLine | InputError]:
    """A line, or why it is none; and its id as far as that can be read."""
    found: Any = None
    try:
        if len(raw.rstrip(b"\r\n")) > MOST_BYTES:
            raise file.wrong(f"a line of at most {MOST_BYTES:,} bytes", "more", line=number)
        found = file.parsed(raw.decode(), number)
        line = PromptLine(prompt=found) if isinstance(found, str) else msgspec.convert(found, PromptLine)
        line.check()
        return line.id, line
    except UnicodeDecodeError as error:
        refused = file.wrong("a text in UTF-8", f"the byte 0x{raw[error.start]:02x}", line=number)
    except UnicodeEncodeError as error:  # msgspec reads names as UTF-8
        refused = file.wrong("a text in Unicode", f"a lone surrogate: {error.reason}", line=number)
    except msgspec.ValidationError as error:
        unknown = [k for k in found if k not in PromptLine.__struct_fields__] if isinstance(found, dict) else []
        guess = did_you_mean(unknown[0], PromptLine.__struct_fields__) if unknown else ""
        refused = file.wrong("a prompt in JSON, as the README says", error, line=number, remedy=file.remedy + guess)
    except InputError as error:
        refused = error
    own = found.get("id") if isinstance(found, dict) else None
    return own if type(own) in (str, int) else None, refused
