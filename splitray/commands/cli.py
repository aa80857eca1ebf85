"""The command `splitray`: its commands, signals, exit codes, and errors that say what to do.

Each command has a file of its own, which reads its options, calls the library and prints what comes back. torch and Ray
are imported inside functions only, so that `splitray --help` is quick. Exit codes: 0 ok, 1 failure, 2 usage or bad
input, 130 Ctrl-C, 141 the reader of standard output left, 143 SIGTERM.
"""

import os
from typing import Any

import typer
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
from splitray.report.boundary import told_errors
from splitray.report.stdout import reader_may_leave
from splitray.signals import INTERRUPTED, TERMINATED, heed_signals

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
        with told_errors(as_json="--json" in ctx.args):
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


for _command in (generate, plan, simulate, evaluate, serve, demo, perplexity, doctor, profile, bench):
    app.command()(_command)


@app.callback()
def _splitray() -> None:
    """One language model over weak edge devices and strong cloud workers, split finer than layers."""


def main() -> None:
    """The console script."""
    heed_signals()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with reader_may_leave():
            app(prog_name="splitray")
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            os._exit(int(end.code))  # all is cleaned up; a thread that some library left must not keep the program
        raise


if __name__ == "__main__":
    main()
