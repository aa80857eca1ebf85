"""A file with a prompt a line, read line by line; or standard input, which is kept in a file first."""

import hashlib
import io
import itertools
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from splitray.errors import InputError
from splitray.prompts.prompt_line import MOST_BYTES, Id, PromptLine, read_line
from splitray.scratch import scratch_folder
from splitray.user_file import UserFile

_BOM = b"\xef\xbb\xbf"
_REMEDY = "correct the line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One prompt of a file, or why that line is none. `index` counts prompts from 0 on, `line` lines from 1 on."""

    index: int
    line: int
    id: Id
    prompt: PromptLine | InputError


@contextmanager
def prompts_file(path: str) -> Iterator[UserFile]:
    """The file of that name; `-` is all of standard input.

    Raises:
        InputError: standard input is closed.
    """
    if path != "-":
        yield UserFile(path, "prompts", _REMEDY)
        return
    if sys.stdin is None:
        raise InputError("--prompts -", expected="prompts on standard input", actual="it is closed",
                         remedy="give a file")  # fmt: skip
    with scratch_folder() as folder:
        kept = folder / "prompts.jsonl"
        with kept.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        yield UserFile(kept, "standard input, kept in", _REMEDY)


def content_hash(file: UserFile) -> str:
    """SHA-256 of its content.

    Raises:
        InputError: see `UserFile.opened`.
    """
    with file.opened() as raw:
        return hashlib.file_digest(cast(io.BufferedReader, raw), "sha256").hexdigest()


def num_prompts(file: UserFile) -> int:
    """How many prompts there are, good and bad.

    Raises:
        InputError: see `UserFile.raw_lines`, or it is one JSON array.
    """
    count = 0
    for number, raw in _prompts(file):
        if count == 0 and raw.lstrip().startswith(b"["):
            raise file.wrong("a JSON object on each line", "an array", line=number,
                             remedy="write its items on a line each: jq -c '.[]' FILE")  # fmt: skip
        count += 1
    return count


def entries(file: UserFile, *, first: int = 0) -> Iterator[Entry]:
    """The prompts from that index on, in order; memory for one at a time.

    Raises:
        InputError: see `UserFile.raw_lines`. A line that is no prompt is an entry.
    """
    for index, (number, raw) in itertools.islice(enumerate(_prompts(file)), first, None):
        own, prompt = read_line(file, number, raw)
        yield Entry(index=index, line=number, id=own, prompt=prompt)


def _prompts(file: UserFile) -> Iterator[tuple[int, bytes]]:
    for number, raw in file.raw_lines(MOST_BYTES):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line.strip():
            yield number, line
