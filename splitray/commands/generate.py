"""`splitray generate`: one prompt through a model that is split over devices, shown as it comes."""

from contextlib import ExitStack
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from splitray.commands import options
from splitray.model.folder import check_folder
from splitray.ray_address import running_cluster
from splitray.report.progress import progress
from splitray.report.stdout import print_json, stdout_kept


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.", metavar="TEXT")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead of a text.", metavar="1,2,3")] = None,
    topology: options.TopologyFile = None,
    devices: options.Devices = None,
    planner: options.Planner = None,
    placement: options.PlacementFile = None,
    replan: options.Replan = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most to generate.", metavar="N")] = 64,
    runtime: options.Runtime = "process",
    dtype: options.Dtype = "float32",
    weights: options.Weights = "auto",
    sums: options.Sums = "fixed",
    codec: options.ChosenCodec = "none",
    channel: Annotated[
        str, typer.Option(help="What happens on the way, as in perplexity: loss:0.1.", metavar="CHANNEL")
    ] = "none",
    seed: options.Seed = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", metavar="X")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many; 0 is off.", metavar="N")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample within that mass; 1 is off.", metavar="X")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", metavar="X")] = 1.0,
    skip_special_tokens: Annotated[
        bool, typer.Option("--skip-special-tokens/--keep-special-tokens", help="Leave them out of the text.")
    ] = True,
    start_s: options.StartS = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with one model split over several devices."""
    console = Console(stderr=as_json, highlight=False)
    live = console.is_terminal and not as_json
    pieces: list[str] = []
    with stdout_kept(as_json), progress(Console(stderr=True), "Reading the model") as spin, ExitStack() as stack:
        if model != "tiny":
            check_folder(model)
        cluster = running_cluster() if runtime == "ray" else None
        from splitray.channel import as_channel
        from splitray.local_ray import some_ray
        from splitray.report.run import run_table
        from splitray.runtime.engine.policy import Recovery
        from splitray.runtime.generation import continue_prompt, read_prompt
        from splitray.runtime.launch import launch_engine, read_topology
        from splitray.runtime.sampling import Sampling

        where = read_topology(topology, devices)
        asked = read_prompt(model, text=prompt, ids=prompt_ids)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_ids=asked.stop_ids,
        )
        if runtime == "ray":
            spin("Starting Ray")
            stack.enter_context(some_ray(cluster, where))
        engine = stack.enter_context(
            launch_engine(
                model=model,
                topology=where,
                planner=planner,
                placement=placement,
                runtime=runtime,
                seed=seed,
                dtype=dtype,
                weights=weights,
                sums=sums,
                codec=codec,
                channel=as_channel(channel, seed=seed),
                recovery=Recovery(replan="drift_plus_penalty"),
                replan=replan,
                context=len(asked.ids) + max_new_tokens,
                start_s=start_s,
                progress=lambda what: spin(what.capitalize()),
            )
        )
        spin("Reading the prompt")

        def tell(piece: str) -> None:
            spin("")
            if live:
                console.print(Text(piece), end="", soft_wrap=True)
            pieces.append(piece)

        document = continue_prompt(
            engine,
            asked.ids,
            sampling,
            tell=tell,
            skip_special_tokens=skip_special_tokens,
            shared_process=runtime == "local",
        )
    if as_json:
        print_json(document)
        return
    console.print(Text("" if live else "".join(pieces)), soft_wrap=True)
    console.print()
    console.print(run_table(document))
