"""How the programs of this project end on Ctrl-C, SIGTERM and SIGHUP: soon, and with everything that they started.

Knows no command. Before a command begins there is nothing to clean up, so a signal ends the program on the spot. In a
command it is an exception, which leaves through every cleanup. A second one, or one in the middle of an import, ends
all processes and removes all folders of the command without it.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 130, 143
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.1
_ROUNDS = 3


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: leaves as Ctrl-C does, through every cleanup."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class _State:
    """Of the process, as its handlers are."""

    in_command = False


def heed_signals() -> None:
    """For the first line of a program, before the imports that take seconds."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` in a script ask to be spared
            signal.signal(number, leave)
    sys.unraisablehook = _not_lost


@contextmanager
def cleaned_up() -> Iterator[None]:
    """For the length of a command, which may start what has to be ended."""
    import psutil  # noqa: F401 - `_end_all` needs it; at the top it would take time before signals are heeded

    _State.in_command = True
    try:
        yield
    finally:
        _State.in_command = False


def leave(number: int, frame: FrameType | None) -> None:
    """The handler of the first signal.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        Terminated: another signal did.
    """
    if not _State.in_command or _importing(frame):
        _leave_now(number, frame)
    for each in _SIGNALS:
        signal.signal(each, _leave_now)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated


def _importing(frame: FrameType | None) -> bool:
    """Where an exception would abort the process in torch's C++, or pass for a missing module; it takes seconds."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _not_lost(unraisable: Any) -> None:
    """A signal that came while a library called Python from C, or in a fork, would be lost: it comes again."""
    if unraisable.exc_type not in (KeyboardInterrupt, Terminated):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGINT if unraisable.exc_type is KeyboardInterrupt else signal.SIGTERM
    for each in _SIGNALS:
        signal.signal(each, leave)
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _leave_now(number: int, frame: FrameType | None) -> NoReturn:
    """End the program, and all that it started, without asking."""
    if _State.in_command:
        _end_all()
    what = b"interrupted" if number == signal.SIGINT else b"terminated"
    os.write(2, b"error: " + what + b"; everything that was started has been stopped\n")
    os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)


def _end_all() -> None:
    import psutil

    from splitray.scratch import remove_all

    for _ in range(_ROUNDS):  # one that is being started now shows in the next
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    remove_all()
