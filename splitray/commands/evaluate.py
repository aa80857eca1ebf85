"""`splitray evaluate`: suites that compare planners, as a report in which every number says where it comes from."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from splitray.commands import options
from splitray.evaluate.suites import SUITES, run
from splitray.report.progress import progress
from splitray.report.stdout import print_json, stdout_kept
from splitray.report.suite import suite_named, suites_help
from splitray.results import result_folder
from splitray.unfinished import unfinished


def evaluate(
    suite: Annotated[str, typer.Option(help=suites_help(SUITES), metavar="NAME")] = "planners",
    traces: Annotated[
        list[str] | None,
        typer.Option("--trace", help="A bandwidth trace as `simulate` takes it; may be given again.", metavar="TRACE"),
    ] = None,
    arrivals: Annotated[str | None, typer.Option(help="As `simulate` takes them.", metavar="ARRIVALS")] = None,
    slots: Annotated[int, typer.Option(help="Slots of a simulation.", min=1, metavar="N")] = 200,
    seed: options.Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes, for the suite splitwise.", min=1, metavar="N")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report and its plots into it; a run that was ended goes on there.", metavar="DIR"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare planners on equal terms and beside the papers' figures; every number says where it comes from."""
    from rich.markdown import Markdown

    from splitray.evaluate.options import Options

    asked = Options(traces=tuple(traces or ()), arrivals=arrivals, slots=slots, seed=seed, workers=workers)
    suite_named(suite, SUITES)
    with ExitStack() as stack:
        stack.enter_context(stdout_kept(as_json))
        if out is not None:
            facts = {k: v for k, v in asdict(asked).items() if k not in ("workers", "done")}
            stack.enter_context(result_folder(out, {"command": "evaluate", "suite": suite, **facts}))
        asked = replace(asked, done=stack.enter_context(unfinished(None if out is None else out / "unfinished.pickle")))
        spin = stack.enter_context(progress(Console(stderr=True), "Reading"))
        report = run(suite, asked, tell=lambda what: spin(what.capitalize()))
        written = [] if out is None else report.save(out)
    if as_json:
        print_json(report.document())
        return
    console = Console(highlight=False)
    console.print(Markdown(report.markdown().partition("![")[0]))
    if written:
        console.print(Text(f"{out}: {', '.join(p.name for p in written)}", "dim"))
