"""What `splitray demo` shows: one small model split inside its layers over two Ray actors, served, and checked.

It prints to the console it is given, and needs neither a terminal nor input.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitray.local_ray import private_ray, served
from splitray.model.reading import read_arch, read_config
from splitray.placement import Placement
from splitray.profiling.link_drop import NEW_TOKENS as DROP_TOKENS
from splitray.profiling.link_drop import PLANNER as DROP_PLANNER
from splitray.profiling.link_drop import LinkDrop, link_drop
from splitray.profiling.named_placements import uneven_placement
from splitray.profiling.planner_trial import PlannerTrial, choose
from splitray.profiling.reference import Reference, ask_transformers, difference
from splitray.profiling.served_answer import ServedAnswer, ask, stats
from splitray.report.export import as_svg, as_text
from splitray.report.picture import placement_picture
from splitray.report.progress import progress
from splitray.report.quantities import bytes_text, seconds_text
from splitray.report.run import run_table
from splitray.results import write_whole
from splitray.runtime.generation import run_document
from splitray.runtime.launch import model_path, needed_tokenizer, read_model
from splitray.scratch import scratch_folder
from splitray.topology import Topology

PROMPT = "Return the"
NEW_TOKENS = 48
PLANNERS = ("exact", "splitwise")
IDENTICAL = "tokens identical to transformers"
_MODEL_NAME = "demo"
_STRIKE_AT = 5  # pieces of text


def demonstrate(
    console: Console, *, model: str = "tiny", runtime: str = "ray", out: Path | None = None
) -> dict[str, Any]:
    """Everything from a checkpoint to a checked answer; `identical` of the document says how it ended.

    `out` is an existing folder for demo.json and the picture as text and SVG; the demo's own `runtime` is `ray`.

    Raises:
        InputError: the model cannot be used.
        OSError: `out` cannot be written.
        DeviceLost: a device died.
        StartFailed: Ray or Serve did not come up.
    """
    started = time.monotonic()
    _say(console, "One language model on an edge device and a cloud worker, split inside layers.\n")
    topology = Topology.uniform(2)
    references: list[Reference] = []
    with ExitStack() as stack:
        with progress(console, "Starting Ray on this machine") as tell:
            stack.enter_context(private_ray(topology))
            tell("Reading the model and testing its architecture")
            arch, _, _ = read_model(model)
            tokenizer = needed_tokenizer(model)
        folder = str(model_path(model).resolve())
        placement = uneven_placement(arch, topology)
        picture = placement_picture(placement, arch, topology)
        size = f"{arch.num_params / 1e6:,.1f} million weights, {bytes_text(arch.model_bytes)}"
        _say(console, f"{model}: a {arch.name} model, {arch.num_layers} layers, {size}\n")
        console.print(picture)
        file = stack.enter_context(_saved(placement))
        with progress(console, "Starting Serve and an actor for each device, which reads its own slices"):
            arguments = {"model": folder, "model_name": _MODEL_NAME, "devices": 2, "placement": file}
            url = stack.enter_context(
                served(
                    {**arguments, "runtime": runtime},
                    meanwhile=lambda: references.append(
                        ask_transformers(folder, tokenizer, PROMPT, new_tokens=NEW_TOKENS, long_tokens=DROP_TOKENS)
                    ),
                )
            )
        _say(console, f"\nRay {version('ray')} runs {_actors(url, topology)}.")
        _say(console, f"POST {url}/v1/completions, {NEW_TOKENS} tokens at most, streamed:\n")
        answer = _ask(console, url)
        served_stats = stats(url)
        victim = topology.ids[0]
        pid = served_stats["devices"][victim]["pid"]
        _say(console, f"Once more; in mid-sentence {victim} (pid {pid}) is killed by SIGKILL:\n")
        survived = _ask(console, url, strike=lambda: os.kill(pid, signal.SIGKILL))
        _say(console, f"The longest wait between two tokens was {seconds_text(survived.longest_gap_s)}.\n")
        with progress(console, "Stopping Serve and Ray"):
            stack.close()
    choices, measured = _planned(console, Path(folder), placement, topology)
    drop = _dropped(console, Path(folder), placement, measured, tokenizer(PROMPT)["input_ids"])
    (reference,) = references
    problem = difference(answer, reference) or difference(survived, reference)
    if problem is None and drop.token_ids != reference.long_ids[: len(drop.token_ids)]:
        problem = "tokens differ from transformers: those of the run whose link became slow"
    run_facts = {**served_stats["run"], "ttft_s": answer.ttft_s, "tpot_s": answer.tpot_s}
    document = {
        "model": model,
        "prompt": PROMPT,
        **run_document(
            token_ids=reference.token_ids if problem is None else (),
            text="".join(answer.pieces),
            run=run_facts,
            exchanges_per_token=served_stats["exchanges_per_token"],
            epoch=served_stats["epoch"],
            devices={d: served_stats["devices"][d] for d in topology.ids},
        ),
        "killed": {"device": str(victim), "longest_gap_s": survived.longest_gap_s},
        "identical": problem is None,
        "difference": problem,
        "link_drop": {
            "link_bytes_per_s": drop.link_bytes_per_s,
            "reaction_s": drop.reaction_s,
            "phases": [
                {"name": p.name, "tokens": p.tokens, "predicted_tpot_s": p.predicted_s, "measured_tpot_s": p.measured_s}
                for p in drop.phases
            ],
            "placement": drop.phases[-1].placement.to_document(),
        },
        "planners": [
            {
                "name": c.name,
                "predicted_tpot_s": c.predicted_s,
                "measured_tpot_s": c.measured_s,
                "error": c.error,
                "placement": c.placement.to_document(),
            }
            for c in choices
        ],
        "placement": placement.to_document(),
        "duration_s": round(time.monotonic() - started, 1),
    }
    console.print(run_table({**document, "token_ids": range(answer.num_tokens)}))
    if out is not None:
        write_whole(out / "demo.json", json.dumps(document, indent=1) + "\n")
        write_whole(out / "placement.txt", as_text(picture))
        write_whole(out / "placement.svg", as_svg(picture, title=f"{model} on two devices"))
        _say(console, f"{out / 'demo.json'}, placement.txt and placement.svg beside it\n")
    _say(console, problem or IDENTICAL, "bold green" if problem is None else "bold red")
    return document


def _planned(
    console: Console, folder: Path, shown: Placement, topology: Topology
) -> tuple[list[PlannerTrial], Topology]:
    """What `exact` and the learned policy would do here, beside what was shown; predicted and measured."""
    others = {"the placement above": shown}
    with progress(console, "Measuring this machine for the planners") as tell:
        choices, measured = choose(folder, PLANNERS, others, progress=lambda what: tell(what.capitalize()))
    for c in choices[: len(PLANNERS)]:
        chosen = c.placement.devices
        where = f"everything on {chosen[0]}" if len(chosen) == 1 else f"pieces on {', '.join(chosen)}"
        _say(console, f"Planner {c.name} would put {where}.")
    _say(console, "Two processes of this machine, a later token:\n")
    table = _table("predicted", "measured", "error")
    for c in choices:
        table.add_row(c.name, seconds_text(c.predicted_s), seconds_text(c.measured_s), f"{c.error:+.0%}")
    console.print(table)
    _say(console, "")
    return choices, measured


def _dropped(
    console: Console, folder: Path, placement: Placement, measured: Topology, prompt_ids: list[int]
) -> LinkDrop:
    """A run whose link becomes slow; a planner moves it while it goes on."""
    with progress(console, "Generating while the link becomes slow"):
        drop = link_drop(folder, placement, measured, prompt_ids)
    rate, later = f"{bytes_text(drop.link_bytes_per_s)}/s", seconds_text(drop.reaction_s)
    _say(console, f"While the first placement generates, the link between the two falls to {rate} (emulated). The")
    _say(console, f"controller measures it, asks {DROP_PLANNER}, and {later} later this runs:\n")
    arch, _ = read_arch(read_config(folder))
    console.print(placement_picture(drop.phases[-1].placement, arch, measured))
    table = _table("tokens", "predicted", "measured")
    for p in drop.phases:
        found = "-" if p.measured_s is None else seconds_text(p.measured_s)
        table.add_row(p.name, str(p.tokens), seconds_text(p.predicted_s), found)
    console.print(table)
    _say(console, "")
    return drop


def _actors(url: str, topology: Topology) -> str:
    pids = {device: facts["pid"] for device, facts in stats(url)["devices"].items()}
    return " and ".join(f"{d.tier.capitalize()}Actor {d.id} (pid {pids[d.id]})" for d in topology.devices)


def _ask(console: Console, url: str, strike: Callable[[], None] | None = None) -> ServedAnswer:
    """Ask and show the answer as it comes; `strike` is called in the middle of it."""
    console.print(Text(PROMPT, "bold"), end="")
    shown = 0

    def tell(piece: str) -> None:
        nonlocal shown
        shown += 1
        console.print(Text(piece), end="", soft_wrap=True)
        if strike is not None and shown == _STRIKE_AT:
            strike()
            console.print(Text(" ✗", "bold red"), end="")

    body = {"model": _MODEL_NAME, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = ask(url, body, tell=tell)
    console.print("\n")
    return answer


def _table(*columns: str) -> Table:
    """Figures on the right of a name."""
    table = Table(box=None, show_header=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


@contextmanager
def _saved(placement: Placement) -> Iterator[str]:
    with scratch_folder() as folder:
        path = folder / "placement.yaml"
        placement.save(path)
        yield str(path)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style))
