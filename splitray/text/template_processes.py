"""Processes in which chat templates run: a template is a program of others, and may not end or ask for all memory.

One process has read transformers (without torch) and forks others from itself, each of which writes dialogues one
after the other; it ends with the process that started it. Knows no tokenizer and no HTTP.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from splitray.text.dialogue import Habits, LeftOut, written

CPU_S = 1.0  # for one dialogue, all forms of it; most take milliseconds
_CPU_S_PER_BYTE = 5e-6  # more for a long one: some templates look at every character
MEMORY_BYTES = 400_000_000
_KEPT = 4  # idle ones
_PROMPT_PER_REQUEST = 16  # a longer prompt than this many times the request is no prompt but a fault
_NEVER_ENDS = f"it did not end in {CPU_S:g} s and {_CPU_S_PER_BYTE:g} s for each byte of the dialogue"


class TemplateProcesses:
    """Writes dialogues, each within CPU_S and MEMORY_BYTES. May be used by many threads at once."""

    def __init__(self) -> None:
        """Start the first process, which is ready after a second or two."""
        self._idle: deque[Connection] = deque()
        self._starting = threading.Lock()
        self._start()

    def write(self, request: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        """What became of a dialogue: `{"text": ...}`, or `{"why": ..., "line": ...}` with the template's line or None.

        Args:
            request: arguments of transformers' render_jinja_template, and `messages`.
            trusted: whether the template is the model's own: others get a process for themselves.
        """
        try:
            question = json.dumps(request, default=str).encode()
        except RecursionError:
            return {"why": "what it shall write is nested too deep", "line": None}
        try:
            process = self._idle.pop() if trusted else self._forked()
        except IndexError:
            process = self._forked()
        try:
            process.send_bytes(question)
            reply: dict[str, Any] = json.loads(process.recv_bytes())
        except (EOFError, OSError) as error:
            process.close()
            if self._first.poll() is not None:
                raise ChildProcessError(f"the process for templates has ended: {self._first.returncode}") from error
            return {"why": f"{_NEVER_ENDS}, or asked for more than {MEMORY_BYTES:,} bytes", "line": None}
        if trusted and "text" in reply and len(self._idle) < _KEPT:
            self._idle.append(process)
        else:
            process.close()
        return reply

    def _start(self) -> None:
        self._door, theirs = socket.socketpair()
        with theirs:
            # Imports are found as here, which may be in a folder that Ray has made, and never in the working folder.
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main({theirs.fileno()})"
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._first = subprocess.Popen([sys.executable, "-c", code], env=os.environ | quiet,
                                           pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def _forked(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs, self._starting:
            if self._first.poll() is not None:  # it was killed
                self._door.close()
                self._start()
            socket.send_fds(self._door, [b"1"], [theirs.fileno()])
        return Connection(ours.detach())


@cache
def template_processes() -> TemplateProcesses:
    """Those of this process."""
    return TemplateProcesses()


def main(door: int) -> None:
    """The first process: fork another one for each socket that comes through the door."""
    import psutil
    import transformers.utils.chat_template_utils  # noqa: F401 - what all need

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=door) as calls:
        while True:
            asked, (*sockets,) = socket.recv_fds(calls, 1, 1)[:2]
            if not asked:
                return
            if os.fork() == 0:
                calls.close()
                most = psutil.Process().memory_info().vms + MEMORY_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                _write_on(Connection(sockets[0]))
            os.close(sockets[0])


def _write_on(requests: Connection) -> NoReturn:
    """Answer requests until the other end closes or one of them is too much."""
    signal.signal(signal.SIGPROF, _too_long)
    try:
        while True:
            request = requests.recv_bytes()
            most_s = CPU_S + _CPU_S_PER_BYTE * len(request)
            signal.setitimer(signal.ITIMER_PROF, most_s)
            signal.setitimer(signal.ITIMER_VIRTUAL, most_s + 0.2)  # ends the process, inside a call of C, too
            reply = _reply(json.loads(request), _PROMPT_PER_REQUEST * len(request) + 1_000_000)
            for timer in (signal.ITIMER_PROF, signal.ITIMER_VIRTUAL):
                signal.setitimer(timer, 0)
            requests.send_bytes(json.dumps(reply).encode())
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


def _reply(request: dict[str, Any], most_characters: int) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = request.pop("messages")
    try:
        habits = _habits(request["chat_template"])
        text = written(messages, lambda formed: render_jinja_template([list(formed)], **request)[0][0], habits)
        if len(text) > most_characters:
            return {"why": f"it writes {len(text):,} characters", "line": None}
        return {"text": text}
    except Exception as error:  # a boundary: templates are programs of others
        return {"why": _told(error), "line": _line(error)}


@cache
def _habits(template: str) -> Habits:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return Habits.of(_compile_jinja_template(template).environment.parse(template))


def _told(error: Exception) -> str:
    from jinja2 import TemplateError

    if isinstance(error, TimeoutError):
        return _NEVER_ENDS
    if isinstance(error, MemoryError):
        return f"it asks for more than {MEMORY_BYTES:,} bytes"
    if isinstance(error, TypeError) and "no loader" in str(error):
        return "it includes another template, which a chat template cannot"
    told = str(error) if isinstance(error, TemplateError | LeftOut) else f"{type(error).__name__}: {error}"
    return told[:500]


def _line(error: Exception) -> int | None:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    # Jinja writes its templates' own lines into a traceback.
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _too_long(number: int, frame: object) -> NoReturn:
    raise TimeoutError
