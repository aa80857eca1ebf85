"""`splitray simulate`: planners side by side under one virtual clock, on a trace and on arrivals."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from splitray.commands import options
from splitray.report.progress import bar
from splitray.report.stdout import print_json, stdout_kept
from splitray.results import result_folder


def simulate(
    model: options.PlanModel,
    topology: options.NeededTopology,
    planners: Annotated[
        str, typer.Option(help="Planners to compare, with commas between them; module:Class too.", metavar="A,B")
    ] = "cloud_only,cloud_only_rtt,layer_cut,layer_dp,myopic,drift_plus_penalty",
    bandwidth_trace: Annotated[
        str | None,
        typer.Option(
            help="Of every edge-cloud link; 0 is an outage. A file (time [s], Mbit/s), READER:FILE with "
            "columns, with_ping or packets, or a model: log_ar1[:SIGMA], gilbert_elliott, or both with +.",
            metavar="TRACE",
        ),
    ] = None,
    rtt_trace: Annotated[str | None, typer.Option(help="Likewise (time [s], ms).", metavar="TRACE")] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="CSV arrival_s,prompt_tokens,output_tokens, azure:FILE, burstgpt:FILE, mooncake:FILE, "
            "poisson[:PER_S] (0.2 of the best device's rate) or bursty[:PER_S]; a file is dealt to the edges, PER_S is "
            "of each.",
            metavar="ARRIVALS",
        ),
    ] = None,
    edges: Annotated[
        int | None,
        typer.Option(help="So many users (1), each with the topology's edge devices and links to itself.", metavar="N"),
    ] = None,
    shared_cloud: Annotated[
        bool,
        typer.Option("--shared-cloud", help="All edges share the cloud devices; by default they load them by 0.8."),
    ] = False,
    slots: Annotated[int, typer.Option(help="Slots with arrivals.", min=1, metavar="N")] = 600,
    slot_s: Annotated[float, typer.Option(help="Seconds of a slot.", metavar="S")] = 1.0,
    background: Annotated[float, typer.Option(help="Other work takes up to this share of devices.", metavar="X")] = 0.0,
    lose: Annotated[
        str | None, typer.Option(help="Devices that are gone for a while, with commas.", metavar="ID:FROM_S:TO_S")
    ] = None,
    codec: Annotated[
        Literal["none", "bf16", "int8", "int4"],
        typer.Option(help="How partial sums travel; all but none lose accuracy."),
    ] = "none",
    channel: options.Channel = "none",
    dtype: options.PlanDtype = None,
    weights: options.PlanWeights = None,
    sums: options.Sums = "fixed",
    seed: options.Seed = 0,
    staged: Annotated[bool, typer.Option("--staged/--not-staged", help="Weights lie on every device's disk.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write results, samples and plots into it.", metavar="DIR")] = None,
    as_json: options.Json = False,
) -> None:
    """Compare planners under a virtual clock, on a trace and on arrivals."""
    from splitray.report.simulation import save_simulation, simulation_table
    from splitray.sim.comparison import Comparison, compare

    asked = Comparison(
        model=model, topology=topology, planners=planners, bandwidth_trace=bandwidth_trace, rtt_trace=rtt_trace,
        arrivals=arrivals, slots=slots, slot_s=slot_s, background=background, lose=lose, codec=codec, dtype=dtype,
        weights=weights, sums=sums,
        channel=channel, seed=seed, staged=staged, edges=edges, shared_cloud=shared_cloud,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(stdout_kept(as_json))
        if out is not None:
            stack.enter_context(result_folder(out, {"command": "simulate", **asdict(asked)}))
        tell = stack.enter_context(bar(Console(stderr=True), "Simulating"))
        document, outcomes = compare(asked, tell=tell)
        written = [] if out is None else save_simulation(document, outcomes, out)
    if as_json:
        print_json(document)
        return
    console = Console(highlight=False)
    console.print(simulation_table(document))
    for name, found in document["planners"].items():
        if found["refusal"]:
            console.print(Text(f"{name}: {found['refusal']}", "dim"))
    console.print(Text("simulated; backlog in output tokens; decision is measured", "dim"))
    if written:
        console.print(Text(f"{out}: {', '.join(p.name for p in written)}", "dim"))
