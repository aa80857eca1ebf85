"""Options that several commands have, each with the one help text and type that it has everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Option(
        help="A transformers model's folder, a GGUF file, or `tiny`, which ships with splitray.", metavar="PATH"
    ),
]
PlanModel = Annotated[
    str,
    typer.Option(
        help="gpt2-xl, llama-7b, llama-13b, llama-3-8b, `tiny`, a model's folder or GGUF file.", metavar="NAME"
    ),
]
TopologyFile = Annotated[str | None, typer.Option("--topology", help="Topology file (YAML).", metavar="FILE")]
NeededTopology = Annotated[str, typer.Option("--topology", help="Topology file (YAML).", metavar="FILE")]
Devices = Annotated[int | None, typer.Option(help="So many equal devices instead of a topology (2).", metavar="N")]
_DECIDES = "Decides where what runs: a name, or module:Class[:ARG] of your own"
Planner = Annotated[str | None, typer.Option(help=f"{_DECIDES} (even).", metavar="NAME[:ARG]")]
NeededPlanner = Annotated[str, typer.Option("--planner", help=f"{_DECIDES}.", metavar="NAME[:ARG]")]
Replan = Annotated[
    str | None, typer.Option(help="Planner, likewise, that moves the placement as links change.", metavar="NAME[:ARG]")
]
PlacementFile = Annotated[
    str | None, typer.Option("--placement", help="Placement file (YAML) instead of a planner.", metavar="FILE")
]
Runtime = Annotated[
    Literal["local", "process", "ray"], typer.Option(help="Devices are threads, processes or Ray actors.")
]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")]
Weights = Annotated[
    str,
    typer.Option(
        help="How weights are held: auto (as stored), float32, bfloat16, float16, int8, int4, int4/128, best.",
        metavar="FORMAT",
    ),
]
Sums = Annotated[
    Literal["fixed", "fast"],
    typer.Option(help="fixed: with quantised weights too, no token depends on the placement."),
]
PlanWeights = Annotated[
    str | None, typer.Option(help="How weights are held, as in generate; rows are float32.", metavar="FORMAT")
]
PlanDtype = Annotated[
    Literal["float32", "bfloat16"] | None, typer.Option(help="bfloat16 for names, float32 for folders.")
]
ChosenCodec = Annotated[
    Literal["none", "bf16", "int8", "int4", "auto"],
    typer.Option(help="As in simulate; auto: what drift_plus_penalty:V finds best."),
]
Channel = Annotated[
    str, typer.Option(help="What it costs in quality is weighed, as told by a surrogate.", metavar="CHANNEL")
]
Seed = Annotated[int, typer.Option(help="Of all that is drawn: planners, samples, traces.", min=0, metavar="N")]
Context = Annotated[
    int | None,
    typer.Option(help="Longest request, for which room is kept; longer ones are refused.", min=2, metavar="N"),
]
StartS = Annotated[
    float | None, typer.Option(help="Seconds that a device may take to start (60; actors 120).", min=0.1, metavar="S")
]
Folder = Annotated[Path | None, typer.Option(help="Write the results into it.", metavar="DIR")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]
