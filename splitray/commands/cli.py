"""The command `splitray`: options, signals, exit codes, and errors that say what to do.

It decides nothing: each command calls a module and prints what comes back. torch and Ray are imported inside functions
only, so that `splitray --help` is quick. Exit codes: 0 ok, 1 failure, 2 usage or bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import psutil
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from splitray.errors import DeviceLost, InputError
from splitray.local_ray import StartFailed, Terminated

FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_QUIET = {
    "HF_HUB_OFFLINE": "1",  # models are folders; nothing is looked up elsewhere
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

Model = Annotated[
    str, typer.Option(help="Folder of a transformers model, or `tiny`, which ships with splitray.", metavar="PATH")
]
TopologyFile = Annotated[str | None, typer.Option("--topology", help="Topology file (YAML).", metavar="FILE")]
Devices = Annotated[int | None, typer.Option(help="So many equal devices instead of a topology (2).", metavar="N")]
_DECIDES = "Decides where what runs: a name, or module:Class[:ARG] of your own"
Planner = Annotated[str | None, typer.Option(help=f"{_DECIDES} (even).", metavar="NAME[:ARG]")]
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
Codec = Annotated[
    Literal["none", "bf16", "int8", "int4"], typer.Option(help="How partial sums travel; all but none lose accuracy.")
]
ChosenCodec = Annotated[
    Literal["none", "bf16", "int8", "int4", "auto"],
    typer.Option(help="As in simulate; auto: what drift_plus_penalty:V finds best."),
]
Channel = Annotated[
    str, typer.Option(help="What it costs in quality is weighed, as told by a surrogate.", metavar="CHANNEL")
]
PlanModel = Annotated[
    str, typer.Option(help="gpt2-xl, llama-7b, llama-13b, llama-3-8b, `tiny`, or a model's folder.", metavar="NAME")
]
PlanDtype = Annotated[
    Literal["float32", "bfloat16"] | None, typer.Option(help="bfloat16 for names, float32 for folders.")
]
Seed = Annotated[int, typer.Option(help="Of planner and sampling.", min=0, metavar="N")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]


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
        except (DeviceLost, StartFailed) as error:
            _fail(FAILED, error, f"{error}", as_json)
        except KeyboardInterrupt as error:
            _fail(INTERRUPTED, error, "interrupted; everything that was started has been stopped", as_json)
        except Terminated as error:
            _fail(TERMINATED, error, "terminated; everything that was started has been stopped", as_json)
        except BrokenPipeError as error:
            sys.stdout.flush()  # breaks again if it was our reader who left, as `head` does: then typer ends quietly
            _fail(FAILED, error, "a process that was started has ended too early. Try `splitray doctor`.", as_json)
        except OSError as error:
            _fail(FAILED, error, f"{error}", as_json)
        except Exception as error:  # the program's boundary
            traceback.print_exc()
            _fail(FAILED, error, f"unexpected {type(error).__name__}: {error}. Please report it.", as_json)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def _splitray() -> None:
    """One language model over weak edge devices and strong cloud workers, split finer than layers."""


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.", metavar="TEXT")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead of a text.", metavar="1,2,3")] = None,
    topology: TopologyFile = None,
    devices: Devices = None,
    planner: Planner = None,
    placement: PlacementFile = None,
    replan: Replan = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most to generate.", metavar="N")] = 64,
    runtime: Runtime = "process",
    dtype: Dtype = "float32",
    codec: ChosenCodec = "none",
    channel: Annotated[
        str, typer.Option(help="What happens on the way, as in perplexity: loss:0.1.", metavar="CHANNEL")
    ] = "none",
    seed: Seed = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", metavar="X")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many; 0 is off.", metavar="N")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample within that mass; 1 is off.", metavar="X")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", metavar="X")] = 1.0,
    as_json: Json = False,
) -> None:
    """Continue a prompt with one model split over several devices."""
    _read_torch()
    from splitray.commands.generate import Request, run
    from splitray.report.progress import progress
    from splitray.report.run import run_table

    request = Request(
        model=model, prompt=prompt, prompt_ids=prompt_ids, topology=topology, devices=devices, planner=planner,
        placement=placement, replan=replan, runtime=runtime, dtype=dtype, codec=codec, channel=channel, seed=seed,
        sampling={"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                  "repetition_penalty": repetition_penalty},
    )  # fmt: skip
    console = Console(stderr=as_json, highlight=False)
    live = console.is_terminal and not as_json
    pieces: list[str] = []

    def tell(piece: str) -> None:
        if live:
            console.print(Text(piece), end="", soft_wrap=True)
        pieces.append(piece)

    with _stdout_kept(as_json), progress(Console(stderr=True), "Reading the model") as spin:
        document = run(request, text=tell, progress=spin)
    if as_json:
        _print_json(document)
        return
    console.print(Text("" if live else "".join(pieces)), soft_wrap=True)
    console.print()
    console.print(run_table(document))


@app.command()
def plan(
    model: PlanModel,
    topology: Annotated[str, typer.Option(help="Topology file (YAML).", metavar="FILE")],
    planner: Annotated[str, typer.Option(help=f"{_DECIDES}.", metavar="NAME[:ARG]")],
    context: Annotated[int, typer.Option(help="Tokens of KV cache to plan for.", min=1, metavar="N")] = 512,
    codec: ChosenCodec = "none",
    channel: Channel = "none",
    dtype: PlanDtype = None,
    seed: Annotated[int, typer.Option(help="Of a planner that draws.", min=0, metavar="N")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the placement file.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Say where a planner would put a model, and what that is predicted to cost."""
    from splitray.commands.plan import run
    from splitray.report.picture import placement_picture
    from splitray.report.plan import plan_table

    with _stdout_kept(as_json):
        found = run(
            model=model, topology=topology, planner=planner, context_tokens=context, dtype=dtype, seed=seed,
            codec=codec, channel=channel,
        )  # fmt: skip
    if out is not None:
        found.placement.save(out)
    if as_json:
        _print_json(found.document())
        return
    console = Console(highlight=False)
    console.print(placement_picture(found.placement, found.arch, found.topology))
    console.print()
    console.print(plan_table(found.document(), found.topology))


@app.command()
def simulate(
    model: PlanModel,
    topology: Annotated[str, typer.Option(help="Topology file (YAML).", metavar="FILE")],
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
            help="CSV arrival_s,prompt_tokens,output_tokens, azure:FILE, poisson[:PER_S] (0.2 of the best "
            "device's rate) or bursty[:PER_S].",
            metavar="ARRIVALS",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Slots with arrivals.", min=1, metavar="N")] = 600,
    slot_s: Annotated[float, typer.Option(help="Seconds of a slot.", metavar="S")] = 1.0,
    background: Annotated[float, typer.Option(help="Other work takes up to this share of devices.", metavar="X")] = 0.0,
    lose: Annotated[
        str | None, typer.Option(help="Devices that are gone for a while, with commas.", metavar="ID:FROM_S:TO_S")
    ] = None,
    codec: Codec = "none",
    channel: Channel = "none",
    dtype: PlanDtype = None,
    seed: Annotated[int, typer.Option(help="Of traces, arrivals and planners that draw.", min=0, metavar="N")] = 0,
    staged: Annotated[bool, typer.Option("--staged/--not-staged", help="Weights lie on every device's disk.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write results, samples and plots into it.", metavar="DIR")] = None,
    as_json: Json = False,
) -> None:
    """Compare planners under a virtual clock, on a trace and on arrivals."""
    from splitray.commands.simulate import Request, simulate, write
    from splitray.report.progress import bar
    from splitray.report.simulation import simulation_table

    request = Request(
        model=model, topology=topology, planners=planners, bandwidth_trace=bandwidth_trace, rtt_trace=rtt_trace,
        arrivals=arrivals, slots=slots, slot_s=slot_s, background=background, lose=lose, codec=codec, dtype=dtype,
        channel=channel, seed=seed, staged=staged,
    )  # fmt: skip
    with _stdout_kept(as_json), bar(Console(stderr=True), "Simulating") as tell:
        document, outcomes = simulate(request, tell=tell)
        written = [] if out is None else write(document, outcomes, out)
    if as_json:
        _print_json(document)
        return
    console = Console(highlight=False)
    console.print(simulation_table(document))
    for name, found in document["planners"].items():
        if found["refusal"]:
            console.print(Text(f"{name}: {found['refusal']}", "dim"))
    console.print(Text("simulated; backlog in output tokens; decision is measured", "dim"))
    if written:
        console.print(Text(f"{out}: {', '.join(p.name for p in written)}", "dim"))


@app.command()
def evaluate(
    suite: Annotated[
        str,
        typer.Option(help="planners, splitwise (the learned policy), replacement, or layer-splitting.", metavar="NAME"),
    ] = "planners",
    traces: Annotated[
        list[str] | None,
        typer.Option("--trace", help="A bandwidth trace as `simulate` takes it; may be given again.", metavar="TRACE"),
    ] = None,
    arrivals: Annotated[str | None, typer.Option(help="As `simulate` takes them.", metavar="ARRIVALS")] = None,
    slots: Annotated[int, typer.Option(help="Slots of a simulation.", min=1, metavar="N")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0, metavar="N")] = 0,
    workers: Annotated[int, typer.Option(help="Processes, for the suite splitwise.", min=1, metavar="N")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the report and its plots into it.", metavar="DIR")] = None,
    as_json: Json = False,
) -> None:
    """Compare planners on equal terms and beside the papers' figures; every number says where it comes from."""
    from rich.markdown import Markdown

    from splitray.evaluate.options import Options
    from splitray.evaluate.suites import run
    from splitray.report.progress import progress

    options = Options(traces=tuple(traces or ()), arrivals=arrivals, slots=slots, seed=seed, workers=workers)
    with _stdout_kept(as_json), progress(Console(stderr=True), "Reading") as spin:
        report = run(suite, options, tell=lambda what: spin(what.capitalize()))
        written = [] if out is None else report.save(out)
    if as_json:
        _print_json(report.document())
        return
    console = Console(highlight=False)
    console.print(Markdown(report.markdown().partition("![")[0]))
    if written:
        console.print(Text(f"{out}: {', '.join(p.name for p in written)}", "dim"))


@app.command()
def serve(
    model: Model = "tiny",
    topology: TopologyFile = None,
    devices: Devices = None,
    planner: Planner = None,
    placement: PlacementFile = None,
    replan: Replan = None,
    runtime: Runtime = "ray",
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; clients are not authenticated.", metavar="IP")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535, metavar="N")] = 8000,
    seed: Seed = 0,
) -> None:
    """Run the OpenAI API over a split model on this machine, until Ctrl-C."""
    from splitray.commands.serve import run

    run(
        Console(highlight=False), model=model, topology=topology, devices=devices, planner=planner,
        placement=placement, replan=replan, runtime=runtime, seed=seed, host=host, port=port,
    )  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Write results and picture into it.", metavar="DIR")] = None,
    as_json: Json = False,
) -> None:
    """Split the shipped model over an edge and a cloud actor on this machine, serve it, and check every token."""
    from splitray.commands.demo import run

    with _stdout_kept(as_json):
        document = run(Console(stderr=as_json, highlight=False), out=out)
    if as_json:
        _print_json(document)
    if not document["identical"]:
        raise typer.Exit(FAILED)


@app.command()
def perplexity(
    model: Model,
    text: Annotated[str, typer.Option(help="A UTF-8 file to score.", metavar="FILE")],
    cut: Annotated[
        str | None,
        typer.Option(help="Two devices, the first P layers on one; with --out several, or all.", metavar="P"),
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(help="Placement file (YAML) instead of a cut; with --out several.", metavar="FILE"),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="How what crosses is coded: none, bf16, int8, int4; with --out several.", metavar="NAME"),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            help="none, loss:P, awgn:DB, sigma:S or nakagami:M,OMEGA,HTH; behind commas unit=token or packet:BYTES, "
            "burst=UNITS, fill=last or mean, rescale, snr=DB, sigma=S, equalise. With --out several, also as "
            "loss:0.1/0.2.",
            metavar="CHANNEL",
        ),
    ] = None,
    masks: Annotated[int, typer.Option(help="Draws of the losses that are averaged.", min=1, metavar="N")] = 5,
    tokens: Annotated[int | None, typer.Option(help="Only the text's first tokens.", min=2, metavar="N")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window (the context).", metavar="N")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between two (half of it).", metavar="N")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A sweep over all that is given, into a table to go on with.", metavar="FILE")
    ] = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a text with a model, whole or split, exact, through codecs and over noisy channels."""
    from splitray.profiling.perplexity import PerplexityRequest, run, single, single_cut
    from splitray.profiling.sweep import SweepRequest, sweep
    from splitray.report.progress import bar, progress
    from splitray.report.quality import quality_tables

    codecs, channels, placements = codec or ["none"], channel or ["none"], placement or []
    console = Console(highlight=False)
    if out is not None:
        wanted = SweepRequest(
            model=model, text=text, out=out, cuts=cut, placements=placements, channels=channels, codecs=codecs,
            dtype=dtype, seed=seed, window=window, stride=stride, tokens=tokens, masks=masks,
        )  # fmt: skip
        with _stdout_kept(as_json), bar(Console(stderr=True), "Measuring") as tell:
            measured = sweep(wanted, tell=tell)
        if as_json:
            _print_json(measured.document())
            return
        for table in quality_tables(measured):
            console.print(table)
        return
    request = PerplexityRequest(
        model=model, text=text, cut=single_cut(cut), placement=single("placement", placements),
        codec=single("codec", codecs) or "none", channel=single("channel", channels) or "none", dtype=dtype, seed=seed,
        window=window, stride=stride, tokens=tokens, masks=masks,
    )  # fmt: skip
    with _stdout_kept(as_json), progress(Console(stderr=True), "Reading the model") as spin:
        document = run(request, progress=spin)
    if as_json:
        _print_json(document)
        return
    where = f"split, codec {document['codec']}, channel {document['channel']}"
    where = "one device" if document["placement"] is None else where
    console.print(f"perplexity {document['perplexity']:.4f} over {document['tokens']:,} tokens ({where})")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine, or the cluster it belongs to, and say what to do about each problem."""
    from splitray.commands.doctor import run

    with _stdout_kept(as_json):
        document = run(Console(stderr=as_json, highlight=False))
    if as_json:
        _print_json(document)
    if document["status"] == "problem":
        raise typer.Exit(FAILED)


@app.command()
def profile(
    out: Annotated[Path | None, typer.Option(help="Write it as a topology file (YAML).", metavar="FILE")] = None,
    devices: Annotated[int, typer.Option(help="So many device processes on this machine.", metavar="N")] = 2,
    as_json: Json = False,
) -> None:
    """Measure this machine for the cost model; the result is a topology that plan and generate take."""
    from splitray.commands.profile import run
    from splitray.report.profile import profile_table
    from splitray.report.progress import progress

    with _stdout_kept(as_json), progress(Console(stderr=True), "Starting the devices") as spin:
        document = run(devices=devices, out=out, progress=spin).document()
    if as_json:
        _print_json(document)
        return
    Console(highlight=False).print(profile_table(document))


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="What to measure.", metavar="NAME")] = "engine",
    out: Annotated[Path | None, typer.Option(help="Write the document there too.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Measure split generation against transformers on this machine, or predictions against it (predicted)."""
    from splitray.commands import bench as benches

    code = benches.run(suite, json=as_json, out=out)
    if code:
        raise typer.Exit(code)


def main() -> None:
    """The console script."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` in a script ask to be spared
            signal.signal(number, _leave)
    try:
        app(prog_name="splitray")
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            # All is cleaned up; a thread that some library left waiting must not keep an ended program.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))
        raise


def _read_torch() -> None:
    """With signals held back: one that comes while torch's C++ calls Python would abort the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        import torch  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        _print_json({"error": {"type": type(error).__name__, "message": text, **(facts or {})}})
    raise typer.Exit(code) from error


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


@contextmanager
def _stdout_kept(wanted: bool) -> Iterator[None]:
    """Keep stdout for the document: what libraries and their threads write there goes to stderr meanwhile."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    main()
