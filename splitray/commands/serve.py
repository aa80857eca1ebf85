"""`splitray serve`: the OpenAI API over a split model on this machine, until a signal ends it."""

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from splitray.commands import options
from splitray.errors import StartFailed
from splitray.local_ray import free_port, private_ray, served
from splitray.model.folder import check_folder
from splitray.report.progress import progress

_LOOK_S = 2.0


def serve(
    model: options.Model = "tiny",
    topology: options.TopologyFile = None,
    devices: options.Devices = None,
    planner: options.Planner = None,
    placement: options.PlacementFile = None,
    replan: options.Replan = None,
    weights: options.Weights = "auto",
    sums: options.Sums = "fixed",
    runtime: options.Runtime = "ray",
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; clients are not authenticated.", metavar="IP")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535, metavar="N")] = 8000,
    context: options.Context = None,
    start_s: options.StartS = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option("--trust-request-chat-template", help="Requests may bring chat_template, chat_template_kwargs."),
    ] = False,
    seed: options.Seed = 0,
) -> None:
    """Run the OpenAI API over a split model on this machine, until Ctrl-C."""
    if model != "tiny":
        check_folder(model)
    port = free_port(host, port)
    console, watcher = Console(highlight=False), Console(stderr=True)
    with progress(watcher, "Reading the model"):
        from splitray.planners import make_planner
        from splitray.report.picture import placement_picture
        from splitray.runtime.launch import decide, needed_tokenizer, read_model, read_topology, settled

        where = read_topology(topology, devices)
        arch, _, lean = read_model(model, weights=weights, sums=sums, topology=where)
        if replan is not None:
            make_planner(replan)  # a wrong name is refused before anything starts
        tokens = min(context or 0, arch.context_tokens)
        arch, where = settled(arch, where, weights, planner=planner, placement=placement, seed=seed,
                              context_tokens=tokens, sums=sums, lean=lean)  # fmt: skip
        chosen, _ = decide(arch, where, planner=planner, placement=placement, seed=seed, context_tokens=tokens)
        needed_tokenizer(model)
    console.print(placement_picture(chosen, arch, where))
    arguments: dict[str, Any] = {
        "model": model, "topology": topology, "devices": devices, "planner": planner, "placement": placement,
        "replan": replan, "weights": weights, "sums": sums, "runtime": runtime,
        "seed": seed, "context": context, "start_s": start_s,
        "trust_request_chat_template": trust_request_chat_template,
    }  # fmt: skip
    with ExitStack() as stack:
        with progress(watcher, "Starting Ray") as tell:
            stack.enter_context(private_ray(where))
            tell("Starting Serve and the devices, which load their slices")
            url = stack.enter_context(served(arguments, host=host, port=port))
        name = Path(model).name
        body = json.dumps({"model": name, "prompt": "The list of", "max_tokens": 20})
        console.print(Text(f"\n{name} answers at {url}/v1 until Ctrl-C. Try:\n"))
        request = f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
        console.print(Text(request), soft_wrap=True)
        _watch(host, port)


def _watch(host: str, port: int) -> NoReturn:
    """Look now and then whether Serve still listens; what happens to devices behind it, Serve repairs itself."""
    while True:
        time.sleep(_LOOK_S)
        try:
            socket.create_connection((host, port), timeout=_LOOK_S).close()
        except OSError as error:
            raise StartFailed(f"Serve does not listen on {host}:{port} any more: {error}") from error
