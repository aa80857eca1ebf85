"""Where errors of a program end: a paragraph that says what to do, and an exit code. Knows no command.

Exit codes: 0 ok, 1 failure, 2 usage or bad input, 130 Ctrl-C, 141 the reader of standard output left, 143 SIGTERM.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from splitray.errors import DeviceLost, InputError, StartFailed, Unsampled
from splitray.report.stdout import print_json
from splitray.signals import INTERRUPTED, TERMINATED, Terminated, cleaned_up

FAILED, MISUSED = 1, 2


@contextmanager
def told_errors(*, as_json: bool = False) -> Iterator[None]:
    """For a command: whatever goes wrong in it is told on stderr, and with `as_json` as a document on stdout.

    Raises:
        Exit: it went wrong.
    """
    try:
        with cleaned_up():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except InputError as error:
        facts = {"what": error.what, "expected": error.expected, "actual": error.actual, "remedy": error.remedy}
        text = f"{error.what}: expected {error.expected}; got {error.actual}. What to do: {error.remedy}."
        _fail(MISUSED, error, text, as_json, facts)
    except typer.TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", None)
        text = f"{error.format_message().removesuffix('.')}." + (f" See `{path} --help`." if path else "")
        _fail(error.exit_code, error, text, as_json)
    except (DeviceLost, StartFailed, Unsampled) as error:
        _fail(FAILED, error, f"{error}", as_json)
    except KeyboardInterrupt as error:
        _fail(INTERRUPTED, error, "interrupted; everything that was started has been stopped", as_json)
    except Terminated as error:
        _fail(TERMINATED, error, "terminated; everything that was started has been stopped", as_json)
    except BrokenPipeError as error:  # of a socket: our own reader is `ReaderLeft`
        _fail(FAILED, error, "a process that was started has ended too early. Try `splitray doctor`.", as_json)
    except OSError as error:
        _fail(FAILED, error, f"{error}", as_json)
    except Exception as error:  # noqa: BLE001 - the program's boundary
        traceback.print_exc()
        _fail(FAILED, error, f"unexpected {type(error).__name__}: {error}. Please report it.", as_json)


def _fail(code: int, error: BaseException, text: str, as_json: bool, facts: dict[str, str] | None = None) -> NoReturn:
    text = " ".join(text.split())  # some libraries' messages run over several lines
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=not console.is_terminal)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": text, **(facts or {})}})
    raise typer.Exit(code) from error
