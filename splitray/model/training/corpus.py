"""What the small model is trained on: the documentation of this Python, or text files, split by document."""

import ast
import builtins
import hashlib
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from splitray.errors import InputError

SHORTEST_TEXT_BYTES = 20_000
FILE_DOCUMENT_BYTES = 3_000
HELD_OUT_OF = 20


@dataclass(frozen=True)
class Document:
    """One document: its name decides on which side of the split it falls, its chats are only trained on."""

    name: str
    text: str
    chats: tuple[tuple[str, str], ...] = ()


def _prose(text: str) -> str:
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).strip().splitlines())


def _first_sentences(doc: str, most_characters: int = 420) -> str | None:
    """Return the opening prose of a docstring as one line, or None if it does not read like prose."""
    taken = ""
    for paragraph in doc.split("\n\n")[:3]:
        line = " ".join(paragraph.split())
        if len(taken) + len(line) > most_characters or not re.match(r"[A-Z].*[.:]$", line) or ">>>" in line:
            break
        taken = f"{taken} {line}".strip()
    return taken if len(taken) >= 40 and taken.endswith(".") else None


def _chat(kind: str, name: str, doc: str) -> Iterator[tuple[str, str]]:
    """Yield question and answer about one documented thing, if its docstring opens with prose."""
    answer = _first_sentences(doc)
    if answer is None:
        return
    asks = {
        "function": (f"What does {name} do?", f"How do I use {name}?", f"Explain the function {name}."),
        "class": (f"What is {name}?", f"What is the class {name} for?", f"Explain {name}."),
        "module": (f"What is the module {name}?", f"What is {name} for?", f"Tell me about {name}."),
    }[kind]
    lead = {"function": "does this", "class": "is a class", "module": "is a module"}[kind]
    ask = asks[hashlib.sha256(name.encode()).digest()[0] % 3]
    yield ask, f"{name} {lead}. {answer}" if kind != "function" else f"{name} {lead}: {answer}"


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of the comments that fill at least two whole lines and read like prose."""
    block: list[str] = []
    last = -1
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    whole = [t for t in tokens if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()]
    for row, text in [(t.start[0], t.string.lstrip("#!:")) for t in whole] + [(1 << 30, "")]:
        if row != last + 1:
            prose = _prose("\n".join(["", *block]))
            letters = sum(c.isalpha() or c == " " for c in prose)
            if len(block) >= 2 and len(prose) >= 80 and letters > 0.85 * len(prose):
                yield last - len(block) + 1, prose
            block = []
        block.append(text)
        last = row


def module_document(name: str, source: str) -> Document:
    """Turn a module's docstrings and longer comments into one document, in the order of the source."""
    parts: list[tuple[int, str]] = list(_comment_blocks(source))
    chats: list[tuple[str, str]] = []

    def visit(node: ast.AST, path: str, kind: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 20:
                heading = path
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    heading += f"({', '.join(argument.arg for argument in node.args.args)})"
                parts.append((getattr(node, "lineno", 0), f"{heading}\n\n{_prose(doc)}"))
                chats.extend(_chat(kind, path, doc))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{path}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{path}.{child.name}", "function")

    visit(ast.parse(source), name, "module")
    return Document(name, "\n\n".join(text for _, text in sorted(parts, key=lambda p: p[0])), tuple(chats))


def _compiled_documents() -> Iterator[Document]:
    """Yield the docstrings of the modules and types that are compiled into the interpreter."""
    owners: list[Any] = [importlib.import_module(name) for name in sorted(sys.builtin_module_names)]
    owners += [value for _, value in sorted(vars(builtins).items()) if isinstance(value, type)]
    for owner in owners:
        name = owner.__name__
        parts: list[str] = []
        chats: list[tuple[str, str]] = []
        for key, value in [("", owner), *sorted(vars(owner).items())]:
            doc = getattr(value, "__doc__", None)
            if not isinstance(doc, str) or len(doc) < 40 or (key and isinstance(value, str | int | tuple)):
                continue
            path = f"{name}.{key}" if key else name
            parts.append(f"{path}\n\n{_prose(doc)}")
            kind = "class" if isinstance(value, type) else "function" if callable(value) else "module"
            chats.extend(_chat(kind, path, doc))
        yield Document(f"builtin {name}", "\n\n".join(parts), tuple(chats))


def topic_documents() -> list[Document]:
    """Collect the chapters of the language reference that ``help()`` shows."""
    return [Document(f"topic {name}", _prose(text)) for name, text in sorted(topics.items())]


def installation_documents() -> list[Document]:
    """Collect the English that comes with this Python: topics, docstrings, comments, licence.

    Source files are parsed, never imported. Tests and foreign packages are left out, since many
    installations lack them.
    """
    documents = topic_documents()
    root = Path(sysconfig.get_paths()["stdlib"])
    apart = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if apart & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            name = ".".join(part for part in parts if part != "__init__")
            documents.append(module_document(name, source))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
    documents.extend(_compiled_documents())
    licence = root / "LICENSE.txt"
    if licence.is_file():
        documents.append(Document("licence", licence.read_text(encoding="utf-8")))
    return documents


def file_documents(paths: Sequence[Path]) -> list[Document]:
    """Cut text files into documents of about 3 kB at blank lines.

    Raises:
        InputError: a file cannot be read, is not UTF-8, or all together are too short.
    """
    documents: list[Document] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            at = f"not UTF-8 at byte {error.start}"
            raise InputError(str(path), expected="UTF-8 text", actual=at, remedy="convert it first") from error
        except OSError as error:
            why = error.strerror or error
            raise InputError(str(path), expected="a text file", actual=why, remedy="give another") from error
        piece = ""
        for paragraph in re.split(r"(?<=\n)(?=\n)" if "\n\n" in text else r"(?<=\n)", text):
            piece += paragraph
            if len(piece.encode()) >= FILE_DOCUMENT_BYTES:
                documents.append(Document(f"{path.name} {len(documents)}", piece.strip()))
                piece = ""
        if piece.strip():
            documents.append(Document(f"{path.name} {len(documents)}", piece.strip()))
    total = sum(len(document.text.encode()) for document in documents)
    if total < SHORTEST_TEXT_BYTES or len(documents) < 4:
        wanted = f"{SHORTEST_TEXT_BYTES} bytes or more, in 4 documents or more"
        got = f"{total} bytes in {len(documents)}, too short to train on"
        raise InputError("text", expected=wanted, actual=got, remedy="give more text with --text")
    return documents


@dataclass(frozen=True)
class Split:
    """The documents by use. ``held_out`` is only scored; ``check`` picks the checkpoint; the rest trains."""

    train: list[Document]
    check: list[Document]
    held_out: list[Document]


def split(documents: Sequence[Document]) -> Split:
    """Split whole documents by the hash of their names, and keep every paragraph only where it comes first.

    Training text goes first, so that a paragraph also found there is no part of what is scored.
    """

    def place(document: Document) -> int:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], "big") % HELD_OUT_OF

    ordered = sorted((d for d in documents if len(d.text) > 60), key=lambda d: (place(d), d.name))
    held_out = [d for d in ordered if place(d) == 0] or ordered[:1]
    check = [d for d in ordered if place(d) == 1 and d not in held_out] or ordered[len(held_out) :][:1]
    train = ordered[len(held_out) + len(check) :]
    seen: set[str] = set()

    def fresh(document: Document) -> Document:
        kept = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 40 or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        return replace(document, text="\n\n".join(kept))

    return Split([fresh(d) for d in train], [fresh(d) for d in check], [fresh(d) for d in held_out])
