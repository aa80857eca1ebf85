"""`splitray doctor`: looks at a machine, or at the cluster it belongs to, and says what to do about each problem."""

from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitray.commands import options
from splitray.report.progress import progress
from splitray.report.stdout import print_json, stdout_kept

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(as_json: options.Json = False) -> None:
    """Check this machine, or the cluster it belongs to, and say what to do about each problem."""
    with stdout_kept(as_json):
        document = examine(Console(stderr=as_json, highlight=False))
    if as_json:
        print_json(document)
    if document["status"] == "problem":
        raise typer.Exit(1)


def examine(console: Console) -> dict[str, Any]:
    """Make all checks and show what they found; `status` of the document is the worst one."""
    from splitray.profiling.checks import CHECKS, findings

    checks = []
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    with progress(console, "Looking at this machine") as tell:
        for name, check in CHECKS.items():
            tell(f"Checking {name}")
            checks += findings(name, check)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in checks:
        told = Text(found.found)
        if found.todo:
            told.append(f"\n{found.todo}", "italic")
        table.add_row(Text(found.status, _STYLES[found.status]), found.name, told)
    console.print(table)
    worst = max((c.status for c in checks), key=list(_STYLES).index)
    counts = {s: sum(c.status == s for c in checks) for s in _STYLES}
    summary = ", ".join(f"{n} {s}" + ("s" if n != 1 and s != "ok" else "") for s, n in counts.items())
    console.print(Text(f"\n{summary}", _STYLES[worst]))
    return {"status": worst, "checks": [asdict(c) for c in checks]}
