"""`splitray demo`: the whole of it on this machine, from a checkpoint to a checked answer."""

from contextlib import nullcontext

import typer
from rich.console import Console

from splitray.commands import options
from splitray.report.stdout import print_json, stdout_kept
from splitray.results import result_folder


def demo(out: options.Folder = None, as_json: options.Json = False) -> None:
    """Split the shipped model over an edge and a cloud actor on this machine, serve it, and check every token."""
    with stdout_kept(as_json), nullcontext() if out is None else result_folder(out):
        from splitray.profiling.demonstration import demonstrate

        document = demonstrate(Console(stderr=as_json, highlight=False), out=out)
    if as_json:
        print_json(document)
    if not document["identical"]:
        raise typer.Exit(1)
