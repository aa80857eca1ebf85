"""YAML documents (JSON is YAML, too) without a second meaning: what a scalar is, is told by the key it stands under.

So a device called `no`, `1:30` or `007` is called that, and a number is what YAML 1.2 calls one. What stands twice is
refused, as are tags, several documents and what would not fit in memory. Knows no keys.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from splitray.errors import InputError
from splitray.user_file import MOST_VALUES, UserFile

_MOST_DEPTH = 100
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
_STRING = "tag:yaml.org,2002:str"
_NULLS = ("", "~", "null", "Null", "NULL")
# the core schema of YAML 1.2, less the leading zeros that were octal in 1.1
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_ENDLESS = re.compile(r"([-+]?\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)")
_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})")
"""How JSON escapes a character beyond 16 bits; YAML knows no such pairs."""
COMMA = "write a number with a decimal point and without thousands separators: a comma ends it"
_BASES = {"0x": (re.compile("0x[0-9a-fA-F]+"), 16), "0o": (re.compile("0o[0-7]+"), 8)}


class Plain(str):
    """A scalar without quotes, as it is written: `number` tells whether it may be a number."""

    __slots__ = ()


def number(value: object) -> float | int | None:
    """The number that a value is, from Python or from a document; None if it is none. Text in quotes is none."""
    if isinstance(value, Plain):
        if _NUMBER.fullmatch(value):
            return int(value) if len(value) < 19 and value.lstrip("+-").isdecimal() else float(value)
        if found := _ENDLESS.fullmatch(value):
            return float(value.replace(".", "")) if found[1] else float("nan")
        written, base = _BASES.get(value[:2], (_NUMBER, 10))
        return int(value, base) if len(value) < 19 and written.fullmatch(value) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def kind_of(value: object) -> str:
    """What a value of a document is, in words."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), "a number" if number(value) is not None else "a text")


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """Mappings, lists, texts, `Plain` and None; and where the entries of mappings and lists stand in the file."""

    file: UserFile
    value: Any
    _lines: dict[int, dict[Any, int]] = field(repr=False)
    """By the id of a mapping or list: the line of each key or index."""

    @contextmanager
    def located(self) -> Iterator[None]:
        """What is refused meanwhile is refused with the file and the line of the key that it names.

        Raises:
            InputError: the same, with its place.
        """
        try:
            yield
        except InputError as error:
            line = self._line(error.where or error.what)
            where = f"{self.file.kind} {self.file.path}" + (f":{line}" if line else "")
            raise type(error)(f"{where}: {error.what}", expected=error.expected, actual=error.actual,
                              remedy=error.remedy) from error  # fmt: skip

    def _line(self, where: str) -> int | None:
        """The line of the last part of `devices[3].tier` that is there, None if none is."""
        at, line = self.value, None
        rest = where.removeprefix(f"{self.file.kind}.")
        while isinstance(at, dict | list) and rest:
            known = self._lines.get(id(at), {})
            names = {(f"[{k}]" if isinstance(at, list) else k): k for k in known}
            fits = [n for n in names if rest.startswith(n) and rest[len(n) : len(n) + 1] in ("", ".", "[")]
            if not fits:
                break
            name = max(fits, key=len)
            line, at, rest = known[names[name]], at[names[name]], rest[len(name) :].removeprefix(".")
        return line


def read_yaml(file: UserFile) -> YamlDocument:
    """The one document of a file.

    Raises:
        InputError: the file is no YAML, or has what is refused; with the line.
    """
    text = _PAIR.sub(lambda pair: pair[1] + json.loads(f'"{pair[2]}"'), file.text())
    try:
        reader = _Reader(file, yaml.parse(text, Loader=_LOADER))
        return YamlDocument(file, reader.document(), reader.lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        is_tab = re.search(r"\btabs?\b", said) or (mark is not None and text[mark.index : mark.index + 1] == "\t")
        remedy = "indent with spaces, not with tabs" if is_tab else None
        raise file.wrong("a YAML document", said, line=mark.line + 1 if mark else None, remedy=remedy) from error


class _Reader:
    """Builds values from libyaml's events, of which there are only as many as are asked for."""

    def __init__(self, file: UserFile, events: Iterator[Any]) -> None:
        self.file, self.events, self.lines = file, events, dict[int, dict[Any, int]]()
        self.left = MOST_VALUES
        self.anchors: dict[str, tuple[Any, int]] = {}

    def document(self) -> Any:
        opening = [next(self.events), next(self.events)]
        if not isinstance(opening[1], yaml.DocumentStartEvent):
            raise self.file.wrong("a YAML document", "an empty file")
        value = self._value(next(self.events), 0)
        next(self.events)
        if isinstance(end := next(self.events), yaml.DocumentStartEvent):
            raise self._wrong(end, "one document", "a second one", "write it to a file of its own")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self._wrong(event, f"&{event.anchor} before it", f"*{event.anchor}", "correct the name")
            value, cost = self.anchors[event.anchor]
            self._spend(event, cost)
            return value
        before = self.left
        self._spend(event, 1)
        if event.tag not in (None, "!", _STRING):
            raise self._wrong(event, "a value without a tag", event.tag[:100], "remove the tag")
        if depth > _MOST_DEPTH:
            raise self._wrong(event, f"at most {_MOST_DEPTH} brackets in each other", "more", "correct the brackets")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0] and event.tag is None
            value = event.value if not plain else None if event.value in _NULLS else Plain(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(depth + 1)
        else:
            value = self._mapping(depth + 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, before - self.left
        return value

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        lines: dict[Any, int] = {}
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            lines[len(found)] = event.start_mark.line + 1
            found.append(self._value(event, depth))
        return self._kept(found, lines)

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        lines: dict[Any, int] = {}
        merged: list[dict[str, Any]] | None = None
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._value(event, depth)
            if not isinstance(event, yaml.ScalarEvent) and not isinstance(key, str):
                raise self._wrong(event, "a text for a key", kind_of(key), "write a name before the colon")
            name = event.value if isinstance(event, yaml.ScalarEvent) else str(key)
            if name in own or (name == "<<" and merged is not None):
                remedy = COMMA if name.isdigit() else "remove one of them"
                raise self._wrong(event, "each key of a mapping once", f"{name!r} again", remedy)
            value = self._value(next(self.events), depth)
            if name == "<<" and isinstance(key, Plain):
                merged = value if isinstance(value, list) else [value]
                if not all(isinstance(m, dict) for m in merged):
                    raise self._wrong(event, "mappings to merge", "something else", "write <<: *NAME of a mapping")
            else:
                own[name], lines[name] = value, event.start_mark.line + 1
        for other in merged or ():
            for name in (n for n in other if n not in own):
                own[name], lines[name] = other[name], self.lines[id(other)][name]
        return self._kept(own, lines)

    def _kept(self, found: Any, lines: dict[Any, int]) -> Any:
        if found:
            self.lines[id(found)] = lines
        return found

    def _spend(self, event: Any, values: int) -> None:
        self.left -= values
        if self.left < 0:
            raise self._wrong(event, f"at most {MOST_VALUES:,} values, aliases counted", "more", "give a smaller file")

    def _wrong(self, event: Any, expected: str, actual: str, remedy: str) -> InputError:
        return self.file.wrong(expected, actual, line=event.start_mark.line + 1, remedy=remedy)
