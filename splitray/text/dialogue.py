"""A dialogue as a chat template writes it, with the content of messages in the form that the template reads.

Runs in a process of its own (template_processes.py); knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from markupsafe import escape

Message = dict[str, Any]
# </think>, [/THINK], <|END_RESPONSE|>: marks between a thought and an answer, which templates take out.
_MARK = re.compile(r"</?\w[\w:]*>|<\|\w+\|>|\[/?[A-Z_]+\]|◁/?\w+▷")


class LeftOut(ValueError):  # noqa: N818 - a noun: what became of a message
    """A template that writes a prompt without the words of a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What the syntax tree of a template says of it."""

    parts_only: bool
    """It goes through the parts of a content and never asks if it is a string, as vLLM finds it out.

    Given parts at once, such a template does not go through the characters of a long string.
    """
    replaced: tuple[tuple[str, str], ...]
    """What it puts in the place of words, as some take out their own: /think, /no_think."""

    @classmethod
    def of(cls, tree: Any) -> Habits:
        """Those of a parsed template."""
        reads = (nodes.Getattr, nodes.Getitem, nodes.Name)
        sources = [node for loop in tree.find_all(nodes.For) for node in (loop.iter, *loop.iter.find_all(reads))]
        asks = any(test.name == "string" for test in tree.find_all(nodes.Test))
        calls = [c for c in tree.find_all(nodes.Call) if getattr(c.node, "attr", "") == "replace"]
        calls += [f for f in tree.find_all(nodes.Filter) if f.name == "replace"]
        pairs = [[getattr(a, "value", None) for a in call.args] for call in calls]
        return cls(
            parts_only=not asks and any(_named(node) == "content" for node in sources),
            replaced=tuple(
                (old, new)
                for old, new in (p for p in pairs if len(p) == 2)
                if isinstance(old, str) and isinstance(new, str)
            ),
        )


def written(messages: Sequence[Message], render: Callable[[Sequence[Message]], str], habits: Habits) -> str:
    """The prompt, in which the words of every message stand.

    Some templates read content as a string, some as a list of parts, some one way for one role and the other way for
    another. Messages are given as they came, as transformers does; where the words of one are missing, or its parts
    are written as the code of a list, that one takes the other form. Where this fails the template is asked with
    strings only, with parts only, and with all words in one part, as some read the first alone.

    Args:
        messages: content is a string, or a list of parts with their `text`.
        render: what the template makes of messages; may raise anything.
        habits: of the template.

    Raises:
        LeftOut: in no form do all words come through.
        Exception: what the template raised, on purpose if it did so in any form.
    """
    failures: list[Exception] = []
    as_given = tuple(habits.parts_only or m["content"] != [] and isinstance(m["content"], list) for m in messages)
    joined = [m | {"content": " ".join(_texts(m))} for m in messages]
    strings, parts = (False,) * len(messages), (True,) * len(messages)
    forms = [(messages, start) for start in dict.fromkeys((as_given, strings, parts))]
    for said, in_parts in (*forms, (joined, parts)):
        for _ in range(2):
            try:
                text = render([_formed(m, in_its) for m, in_its in zip(said, in_parts, strict=True)])
            except (TimeoutError, MemoryError):
                raise
            except Exception as error:  # a boundary: templates are programs of others
                failures.append(error)
                break
            lost = _lost(said, in_parts, text, habits)
            if not any(lost):
                return text
            first = lost.index(True)
            failures.append(LeftOut(f"it leaves out the words of messages[{first}] ({messages[first]['role']})"))
            in_parts = tuple(in_its != wrong for in_its, wrong in zip(in_parts, lost, strict=True))
    raise min(failures, key=_importance)


def _named(node: Any) -> object:
    return getattr(node, "attr", None) or getattr(node, "name", None) or getattr(getattr(node, "arg", 0), "value", None)


def _formed(message: Message, in_parts: bool) -> Message:
    content = message["content"]
    if in_parts != isinstance(content, list):
        # transformers' own server joins with a space for a model of text.
        content = [{"type": "text", "text": content}] if in_parts else " ".join(_texts(message))
    return message | {"content": content}


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _lost(messages: Sequence[Message], in_parts: Sequence[bool], prompt: str, habits: Habits) -> list[bool]:
    """Which messages' words are not in a prompt, or stand there in the code of a list.

    Spaces may be others, letters large or small, characters escaped as in JSON or HTML, and words replaced as the
    template's source says. Of what the assistant said the last line is enough, from its last mark on: templates take
    out what it thought in earlier turns.
    """
    squeezed, end, lost = _squeezed(prompt), 0, []
    code = [before for before in ("'text': ", '"text": ') if before in prompt]
    for message, parts in zip(messages, in_parts, strict=True):
        texts = _texts(message)
        values = (value for t in texts for value in (repr(t), _quoted(t))) if parts and code else ()
        as_code = any(c + value[:-1] in prompt for value in values for c in code)  # what follows may be left open
        if message["role"] == "assistant":
            texts = [line for t in texts for line in _MARK.split(t)[-1].strip().splitlines()[-1:]]
        ends = [_end_of(text, squeezed, end, habits) for text in texts]
        end = max([end, *ends])
        lost.append(as_code or -1 in ends)
    return lost


def _end_of(text: str, squeezed: str, last: int, habits: Habits) -> int:
    """Where a text ends in a prompt, or -1; most templates keep the order, so it is sought after the last one first."""
    words = _squeezed(text)
    for start in (last, 0):
        if (at := squeezed.find(words, start)) >= 0:
            return at + len(words)
    left = text
    for old, new in habits.replaced:
        left = left.replace(old, new)
    ways = (_quoted(text)[1:-1], str(escape(text)), left)
    return 0 if any(_squeezed(way) in squeezed for way in ways) else -1


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def _importance(failure: Exception) -> int:
    # raise_exception() of transformers raises this class itself, faults of a template its subclasses.
    return 0 if type(failure) is TemplateError else 1 if isinstance(failure, LeftOut) else 2
