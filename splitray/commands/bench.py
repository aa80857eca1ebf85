"""`splitray bench`: suites that measure this machine."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from splitray.commands import options
from splitray.errors import InputError
from splitray.ray_address import running_cluster
from splitray.report import bench as tables
from splitray.report.families import families_page, families_table
from splitray.report.stdout import print_json, stdout_kept
from splitray.report.suite import Suite, suite_named, suites_help
from splitray.results import result_file, result_folder, write_whole
from splitray.unfinished import Unfinished, unfinished
from splitray.weight_formats import as_format

Say = Callable[[str], None]
Measured = tuple[dict[str, Any], Callable[[Console, dict[str, Any]], None]]


def _engine(say: Say, _: Unfinished) -> Measured:
    running_cluster()  # its devices of Ray come last
    from splitray.profiling.engine_speed import engine_speed

    return engine_speed(say=say), tables.engine_table


def _predicted(say: Say, _: Unfinished, formats: list[str] | None = None) -> Measured:
    from splitray.profiling.predicted import FORMATS, predicted
    from splitray.profiling.random_llama import BENCH_110M

    return predicted(BENCH_110M, formats=formats or FORMATS, progress=say), tables.predicted_table


def _simulator(say: Say, _: Unfinished) -> Measured:
    from splitray.profiling.machine import machine
    from splitray.profiling.simulator_speed import simulator_speed

    before = machine()
    return {**simulator_speed(), "machine": before}, tables.simulator_table


def _faults(say: Say, done: Unfinished) -> Measured:
    from splitray.profiling.fault_bench import faults
    from splitray.profiling.random_llama import BENCH_110M

    return faults(BENCH_110M, say=say, done=done), tables.faults_table


def _families(say: Say, done: Unfinished, names: list[str] | None = None) -> Measured:
    from splitray.profiling.families import sweep

    return sweep(names, say=say, done=done), families_table


def _weights(say: Say, done: Unfinished, names: list[str] | None = None) -> Measured:
    from splitray.profiling.weights_bench import weights

    return weights(names, say=say, done=done), tables.weights_table


SUITES: dict[str, Suite[Callable[[Say, Unfinished], Measured]]] = {
    "engine": Suite(
        "speed and CPU time of split generation beside transformers, and the time of an exchange",
        "six minutes",
        _engine,
    ),
    "predicted": Suite(
        "what the cost model predicts for 25 placements in formats of weights beside what they take",
        "a quarter of an hour",
        _predicted,
    ),
    "simulator": Suite("how fast the virtual clock runs, and how long a planner decides", "three minutes", _simulator),
    "faults": Suite(
        "devices that die: whether tokens stay the same; the cost of recovery, moves and checkpoints",
        "some minutes",
        _faults,
    ),
    "families": Suite(
        "which families of transformers come out exact, split at random; --out FILE.md writes docs/families.md",
        "ten minutes",
        _families,
    ),
    "weights": Suite(
        "formats of weights: time of a token and of a prompt, memory, on one device and split, beside what is aimed at",
        "fifteen minutes",
        _weights,
    ),
}


def bench(
    suite: Annotated[str, typer.Option(help=suites_help(SUITES), metavar="NAME")] = "engine",
    out: options.Folder = None,
    families: Annotated[
        str | None, typer.Option(help="Only these model types, in the suite families.", metavar="A,B,...")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Only these of llama-110m, llama-190m, llama-1b, in the suite weights.", metavar="A,B,..."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Only these formats of weights, in the suite predicted.", metavar="A,B,...")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure this machine; figures mean something only while nothing else runs on it."""
    chosen = suite_named(suite, SUITES)
    measure, page = chosen.run, out is not None and out.suffix == ".md"
    asked = (
        ("--families", families, "families"), ("--models", models, "weights"), ("--weights", weights, "predicted"),
        ("--out", page or None, "families"),
    )  # fmt: skip
    for what, value, of in asked:
        if value is not None and suite != of:
            raise InputError(what, expected=f"--suite {of} with it", actual=f"--suite {suite}",
                             remedy="add or leave out")  # fmt: skip
    some = families or models
    if some is not None:
        measure = partial(_families if suite == "families" else _weights, names=_listed(some))
    if weights is not None:
        measure = partial(_predicted, formats=[as_format(w).name for w in _listed(weights)])
    with ExitStack() as stack:
        stack.enter_context(stdout_kept(as_json))
        if out is not None:
            stack.enter_context(result_file(out) if page else result_folder(out))
        done = stack.enter_context(unfinished(None if out is None else _beside(out, suite, some)))
        import torch

        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        document, table = measure(_say, done)
        if out is not None:
            _write(out, suite, document)
    if as_json:
        print_json(document)
    else:
        console = Console(width=max(110, Console().width), highlight=False)
        table(console, document)
        console.print(f"load before the run      {document['machine']['load_before']:.2f}")


def _listed(names: str) -> list[str]:
    return [n.strip() for n in names.split(",") if n.strip()]


def _beside(out: Path, suite: str, some: str | None) -> Path:
    """Where a run keeps what it has done so far."""
    name = f"unfinished-{suite}" + (f"-{some}" if some else "") + ".pickle"
    return out.with_name(f".{out.name}.{name}") if out.suffix == ".md" else out / name


def _write(out: Path, suite: str, document: dict[str, Any]) -> None:
    if out.suffix == ".md":
        write_whole(out, families_page(document))
    else:
        write_whole(out / f"bench-{suite}.json", json.dumps(document, indent=2) + "\n")


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"  {text}", file=sys.stderr, flush=True)
