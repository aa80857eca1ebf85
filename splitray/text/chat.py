"""The dialogue as text in the model's chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitray.errors import InputError
from splitray.text.dialogue import Message
from splitray.text.template_processes import template_processes

# What transformers itself passes, and what asks for another answer than a text.
_NOT_VARIABLES = frozenset({
    "messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
    "tools", "documents", "tokenize", "return_assistant_tokens_mask", "self",
})  # fmt: skip


def chat_text(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """A dialogue in a chat template, as transformers renders it; special tokens are in the text.

    The template runs in a process of its own, with a limit of time and memory.

    Args:
        messages: each with `role` and `content`, a string or parts of text.
        tokenizer: of the model.
        template: instead of the model's own, or the name of one of its several.
        variables: more that the template knows.
        add_generation_prompt: ready for the assistant's turn.
        continue_final_message: the last message is left open.

    Raises:
        InputError: there is no template, it refuses the dialogue, fails, does not end, or leaves out what somebody
            said; what: `messages`, `chat_template`, `chat_template_kwargs` or `continue_final_message`.
    """
    variables = variables or {}
    if add_generation_prompt and continue_final_message:
        raise InputError("continue_final_message", expected="add_generation_prompt: false with it",
                         actual="both asked for", remedy="leave one out")  # fmt: skip
    taken = sorted(_NOT_VARIABLES & variables.keys())
    if taken:
        raise InputError("chat_template_kwargs", expected="variables of the template", actual=", ".join(taken),
                         remedy="leave them out")  # fmt: skip
    source, name = _template(tokenizer, template)
    request = {
        "messages": messages,
        "chat_template": source,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **tokenizer.special_tokens_map,
        **variables,
    }
    reply = template_processes().write(request, trusted=source != template)
    if "text" not in reply:
        line = "" if reply["line"] is None else f", line {reply['line']}"
        raise InputError(
            "messages" if template is None else "chat_template",
            expected="a dialogue that the chat template takes",
            actual=f"refused by {name}{line}: {reply['why']}",
            remedy="correct the messages or the template, or use /v1/completions",
        )
    return str(reply["text"])


def _template(tokenizer: Any, asked: str | None) -> tuple[str, str]:
    """The source of a template, and what to call it."""
    own = tokenizer.chat_template
    if not own and asked is None:
        raise InputError("messages", expected="a model with a chat template", actual="this model has no chat template",
                         remedy="use /v1/completions")  # fmt: skip
    several = own if isinstance(own, Mapping) else {}
    if asked is None and several and "default" not in several:
        raise InputError(
            "messages",
            expected="one template named `default`",
            actual=f"this model has several chat templates and none is named `default`: {', '.join(sorted(several))}",
            remedy="name one in the argument chat_template, where the server takes it, or use /v1/completions",
        )
    source: str = tokenizer.get_chat_template(asked)
    chosen = asked if asked in several else "default" if several else None
    if asked is not None and chosen != asked:
        return source, "the request's chat_template"
    folder = Path(getattr(tokenizer, "name_or_path", "") or "-")
    files = ["chat_template.jinja"] if chosen in (None, "default") else []
    files += [] if chosen is None else [f"additional_chat_templates/{chosen}.jinja"]
    within = folder.name if folder.is_file() else "tokenizer_config.json"  # a GGUF file has its own
    file = next((f for f in files if (folder / f).is_file()), f"the chat template in {within}")
    return source, file if chosen is None else f"{file} ({chosen})"
