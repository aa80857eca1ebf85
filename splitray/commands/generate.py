"""`splitray generate`: a prompt through a model that is split over devices, shown as it comes; or a file of prompts."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from splitray.commands import options
from splitray.errors import InputError
from splitray.model.folder import check_folder
from splitray.ray_address import running_cluster
from splitray.report.boundary import FAILED
from splitray.report.progress import progress
from splitray.report.stdout import print_json, stdout_kept

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine

_TELL_S = 10.0


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.", metavar="TEXT")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead of a text.", metavar="1,2,3")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="JSON Lines with a prompt each; - is standard input. Answers are JSON Lines.", metavar="FILE"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --prompts: the answers; the same command goes on with a run that was ended.", metavar="FILE"
        ),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="With --out: forget the answers that are there.")] = False,
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
    context: options.Context = None,
    start_s: options.StartS = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with one model split over several devices, or every prompt of a file."""
    _check_together(prompts, prompt, prompt_ids, out, context, anew=anew, as_json=as_json)
    console = Console(stderr=as_json, highlight=False)
    watcher = Console(stderr=True, highlight=False)
    live = console.is_terminal and not as_json
    pieces: list[str] = []
    with (
        stdout_kept(as_json or prompts is not None) as stdout,
        progress(watcher, "Reading the model", every_s=None if prompts is None else _TELL_S) as spin,
        ExitStack() as stack,
    ):
        if model != "tiny":
            check_folder(model)
        cluster = running_cluster() if runtime == "ray" else None
        from splitray.channel import as_channel
        from splitray.local_ray import some_ray
        from splitray.prompts.answering import RequestMaker
        from splitray.prompts.identity import identity
        from splitray.prompts.run import prompts_run
        from splitray.report.run import run_table
        from splitray.runtime.engine.policy import Recovery
        from splitray.runtime.generation import checked_vocab, continue_prompt, read_prompt, stop_ids_of
        from splitray.runtime.launch import launch_engine, read_tokenizer, read_topology
        from splitray.runtime.sampling import Sampling

        where, noise = read_topology(topology, devices), as_channel(channel, seed=seed)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

        def launched(context: int | None) -> "Engine":
            if runtime == "ray":
                spin("Starting Ray")
                stack.enter_context(some_ray(cluster, where))
            return stack.enter_context(
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
                    channel=noise,
                    recovery=Recovery(replan="drift_plus_penalty"),
                    replan=replan,
                    context=context,
                    start_s=start_s,
                    progress=lambda what: spin(what.capitalize()),
                )
            )

        if prompts is not None:
            settings = {
                **asdict(sampling), "skip_special_tokens": skip_special_tokens, "context": context, "dtype": dtype,
                "weights": weights, "sums": sums, "codec": codec, "channel": channel,
            }  # fmt: skip
            places = {"topology": topology, "devices": devices, "planner": planner, "placement": placement,
                      "replan": replan}  # fmt: skip
            checked_vocab(model)
            sampling = replace(sampling, stop_ids=stop_ids_of(model, read_tokenizer(model)))
            run = stack.enter_context(
                prompts_run(prompts, out, stdout, lambda f: identity(f, model, settings, where, places), anew=anew)
            )
            shown = out is not None or not stdout.isatty()  # or the answers show how far it is

            def ready() -> "tuple[Engine, RequestMaker]":
                engine = launched(context)
                spin("Reading the first prompt" if shown else "")
                return engine, RequestMaker(engine, sampling, skip_special_tokens=skip_special_tokens)

            try:
                run.go_on(ready, spin if shown else lambda _: None)
            except BaseException:
                if out is not None and run.file.done:
                    watcher.print(Text(f"{run.told}; the same command goes on"), soft_wrap=True)
                raise
            watcher.print(Text(run.told), soft_wrap=True)
            document = run.document
        else:
            asked = read_prompt(model, text=prompt, ids=prompt_ids)
            engine = launched(len(asked.ids) + max_new_tokens)
            spin("Reading the prompt")

            def tell(piece: str) -> None:
                spin("")
                if live:
                    console.print(Text(piece), end="", soft_wrap=True)
                pieces.append(piece)

            document = continue_prompt(
                engine,
                asked.ids,
                replace(sampling, stop_ids=asked.stop_ids),
                tell=tell,
                skip_special_tokens=skip_special_tokens,
                shared_process=runtime == "local",
            )
    if as_json:
        print_json(document)
    if prompts is not None:
        raise typer.Exit(FAILED if document["errors"] else 0)
    if not as_json:
        console.print(Text("" if live else "".join(pieces)), soft_wrap=True)
        console.print()
        console.print(run_table(document))


def _check_together(
    prompts: str | None, prompt: str | None, prompt_ids: str | None, out: Path | None, context: int | None, *,
    anew: bool, as_json: bool,
) -> None:  # fmt: skip
    """Refuse options that mean nothing beside each other."""
    of_many = (("--out", out), ("--anew", anew or None), ("--context", context))
    for what, value in of_many if prompts is None else (("--prompt", prompt), ("--prompt-ids", prompt_ids)):
        if value is not None:
            raise InputError(what, expected=f"{'' if prompts is None else 'no '}--prompts beside it", actual=value,
                             remedy="leave one out" if prompts else "add --prompts, or leave it out")  # fmt: skip
    if out is None and prompts is not None and (as_json or anew):
        raise InputError("--json" if as_json else "--anew", expected="--out beside it", actual="none",
                         remedy="say where the answers go")  # fmt: skip
