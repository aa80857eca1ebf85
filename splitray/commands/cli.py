"""The command `splitray`: its commands, signals, exit codes, and errors that say what to do.

Each command has a file of its own, which reads its options, calls the library and prints what comes back. torch and Ray
are imported inside functions only, so that `splitray --help` is quick. Exit codes: 0 ok, 1 failure, 2 usage or bad
input, 130 Ctrl-C, 141 the reader of standard output left, 143 SIGTERM.
"""

import os
import signal
import traceback
from types import FrameType
from typing import Any, NoReturn

import psutil
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from splitray.commands.bench import bench
from splitray.commands.demo import demo
from splitray.commands.doctor import doctor
from splitray.commands.evaluate import evaluate
from splitray.commands.generate import generate
from splitray.commands.perplexity import perplexity
from splitray.commands.plan import plan
from splitray.commands.profile import profile
from splitray.commands.serve import serve
from splitray.commands.simulate import simulate
from splitray.errors import DeviceLost, InputError, Unsampled
from splitray.local_ray import StartFailed, Terminated
from splitray.report.stdout import print_json, reader_may_leave

FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_QUIET = {
    "HF_HUB_OFFLINE": "1",  # models are folders; nothing is looked up elsewhere
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class Commands(TyperGroup):
    """Turns every error into one paragraph on stderr, a document on stdout with --json, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except InputError as error:
            facts = {"what": error.what, "expected": error.expected, "actual": error.actual, "remedy": error.remedy}
            text = f"{error.what}: expected {error.expected}; got {error.actual}. What to do: {error.remedy}."
            _fail(MISUSED, error, text, as_json, facts)
        except typer.TyperException as error:
            path = getattr(getattr(error, "ctx", None), "command_path", "splitray")
            text = f"{error.format_message().removesuffix('.')}. See `{path} --help`."
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
        except Exception as error:  # the program's boundary
            traceback.print_exc()
            _fail(FAILED, error, f"unexpected {type(error).__name__}: {error}. Please report it.", as_json)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


for _command in (generate, plan, simulate, evaluate, serve, demo, perplexity, doctor, profile, bench):
    app.command()(_command)


@app.callback()
def _splitray() -> None:
    """One language model over weak edge devices and strong cloud workers, split finer than layers."""


def main() -> None:
    """The console script."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` in a script ask to be spared
            signal.signal(number, _leave)
    try:
        with reader_may_leave():
            app(prog_name="splitray")
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            os._exit(int(end.code))  # all is cleaned up; a thread that some library left must not keep the program
        raise


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """The first signal leaves through every cleanup; the second one makes an end of it."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _leave_now)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated


def _leave_now(number: int, frame: FrameType | None) -> NoReturn:
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)


def _fail(code: int, error: BaseException, text: str, as_json: bool, facts: dict[str, str] | None = None) -> NoReturn:
    text = " ".join(text.split())  # some libraries' messages run over several lines
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=not console.is_terminal)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": text, **(facts or {})}})
    raise typer.Exit(code) from error


if __name__ == "__main__":
    main()
