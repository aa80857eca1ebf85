"""`python -m rllib_configs NAME --out DIR`: train a recipe through Tune, compare it, and write the policy."""

if __name__ == "__main__":
    from splitray.signals import heed_signals

    heed_signals()

import csv
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from rllib_configs import ablations
from rllib_configs.split_point import SPLIT_RECIPES
from rllib_configs.split_point import run as run_split_point
from rllib_configs.splitwise import COMPARED, HELD_OUT, splitwise
from rllib_configs.splitwise_smoke import splitwise_smoke
from splitray.local_ray import some_ray
from splitray.own_code import code_hash
from splitray.ray_address import running_cluster
from splitray.report.boundary import told_errors
from splitray.report.progress import bar
from splitray.report.stdout import reader_may_leave
from splitray.results import RECORD, result_folder, write_whole
from splitray.rl.training.recipe import Recipe

RECIPES: dict[str, Callable[[int], Recipe]] = {
    f.__name__: f
    for f in (
        splitwise, splitwise_smoke, ablations.fifth, ablations.no_foresight,
        ablations.selfish, ablations.dp_modes, ablations.no_dp, ablations.bits,
        ablations.no_warm_start, ablations.no_history, ablations.no_current_placement, ablations.no_lyapunov,
        ablations.single_critic,
    )
}  # fmt: skip
_TUNE_STATE = "tuner.pkl"  # what Tune restores a run from
_SAVES = 10  # checkpoints of a run
_EVALUATION_SEED = 10_000
app = typer.Typer(add_completion=False)


@app.command()
@told_errors()
def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join([*RECIPES, *SPLIT_RECIPES])}.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; on a cluster, one that all nodes share.")],
    iterations: Annotated[int | None, typer.Option(min=1, help="Updates, instead of the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in this folder.")] = False,
) -> None:
    """Train a recipe; what it gives is in OUT/NAME: policy.safetensors, policy.json, progress.csv, TensorBoard."""
    if name not in RECIPES and name not in SPLIT_RECIPES:
        known = ", ".join([*RECIPES, *SPLIT_RECIPES])
        raise typer.BadParameter(f"{name!r} is none of {known}", param_hint="NAME")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would go on for a while, and say that all is done
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    console = Console(stderr=True)
    if name in SPLIT_RECIPES and iterations is not None:
        raise typer.BadParameter(f"{name} is over in minutes: run it as it is", param_hint="--iterations")
    _check_resumption(out / name, resume)
    asked = {"recipe": name, "seed": seed, "iterations": iterations, "code": code_hash()[:12]}
    with result_folder(out / name, asked):
        print(json.dumps(_run(name, out.resolve(), iterations, seed, console, resume=resume)))


def _check_resumption(folder: Path, resume: bool) -> None:
    there = (folder / RECORD).is_file() or (folder / _TUNE_STATE).is_file()
    if resume and not there:
        raise typer.BadParameter(f"nothing to resume in {folder}; run without --resume", param_hint="--resume")
    if not resume and ((folder / _TUNE_STATE).is_file() or (folder / "policy.json").is_file()):
        raise typer.BadParameter(f"{folder} has a run; --resume goes on with it, or give another", param_hint="--out")


def _run(name: str, out: Path, iterations: int | None, seed: int, console: Console, *, resume: bool) -> dict[str, Any]:
    if name in SPLIT_RECIPES:
        with bar(console, name) as told:
            return run_split_point(SPLIT_RECIPES[name](seed), out, told)
    recipe = RECIPES[name](seed)
    total = iterations or recipe.iterations
    if iterations is not None:  # schedules end with the run
        recipe = replace(recipe, iterations=iterations)
    with (
        some_ray(running_cluster(), recipe.cells[0].topology),
        bar(console, name) as told,
        redirect_stdout(sys.stderr),  # Tune prints whatever its verbosity; our answer is one document
    ):
        folder = _trained(recipe, out, total, told, resume=resume and (out / name / _TUNE_STATE).is_file())
    return _finished(recipe, folder, out / name)


def _trained(recipe: Recipe, out: Path, total: int, told: Callable[[int, int], None], *, resume: bool) -> Path:
    """Run it through Tune; gives the folder of the last checkpoint.

    Raises:
        Exit: the run failed, or there is none to go on with.
    """
    from ray.tune import Callback, CheckpointConfig, RunConfig, Tuner

    from splitray.rl.training.algorithm import SplitwisePPO, config_of

    class Told(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            told(int(result["training_iteration"]), total)

    folder = out / recipe.name
    if resume:
        tuner = Tuner.restore(str(folder), trainable=SplitwisePPO, resume_unfinished=True, restart_errored=True)
    else:
        tuner = Tuner(
            SplitwisePPO,
            param_space=config_of(recipe),  # type: ignore[arg-type]  # Ray takes its own configs as well
            run_config=RunConfig(
                name=recipe.name,
                storage_path=str(out),
                stop={"training_iteration": total},
                checkpoint_config=CheckpointConfig(
                    checkpoint_frequency=max(1, total // _SAVES), num_to_keep=2, checkpoint_at_end=True
                ),
                verbose=0,
                callbacks=[Told()],
            ),
        )
    result = tuner.fit()[0]
    if result.error is not None or result.checkpoint is None:
        print(f"error: training failed: {result.error}", file=sys.stderr)
        raise typer.Exit(1)
    _tidied(Path(result.path), folder)
    return Path(result.checkpoint.path)


def _finished(recipe: Recipe, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Compare the policy with the exact program on weather of families that it never saw, and write the card."""
    from splitray.rl.training.export import export, read_modules
    from splitray.rl.training.holdout import learned, paired, program, score
    from splitray.rl.training.learner import act_of

    modules = read_modules(recipe, checkpoint / "policy.safetensors")
    looked_at = COMPARED if len(recipe.cells) > len(COMPARED) else recipe.cells
    ours = learned(act_of(modules), recipe.spec)
    rows = []
    for cell in looked_at:
        for climate in HELD_OUT:
            scores = [
                score(
                    decide, cell, climate, spec=spec, seed=_EVALUATION_SEED,
                    num_instances=min(64, recipe.num_instances), num_slots=recipe.num_slots // 2,
                    leave_out=frozenset(recipe.leave_out),
                )
                for decide, spec in ((ours, recipe.spec), (program(), replace(recipe.spec, variant="dp_knobs")))
            ]  # fmt: skip
            against = paired(scores[0].latency_s, scores[1].latency_s)
            rows.append(
                {
                    "cell": cell.name,
                    "climate": f"load {climate.cloud_load}, sigma {climate.bandwidth_sigma}, {climate.arrivals}",
                    "latency_s": float(np.nanmean(scores[0].latency_s)),  # a weather may have no request
                    "over_program": [against.ratio, against.low, against.high],
                }
            )
    results = {"held_out": rows, **_speed(folder)}
    paths = export(modules, recipe, folder / "policy", results)
    return {"recipe": recipe.name, "policy": [str(p) for p in paths], **results}


def _tidied(trial: Path, folder: Path) -> None:
    """The run's table and TensorBoard beside the policy, from the one trial's folder.

    Tune's own CSV is of no use after a resumption: it goes on in another order of columns under the old header. Its
    JSON lines are in order; an iteration that was done twice counts as it was done last.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in (trial / "result.json").read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        rows[result["training_iteration"]] = {k: v for k, v in _flat(result).items() if not k.startswith("config/")}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows[i] for i in sorted(rows))
    write_whole(folder / "progress.csv", text.getvalue())
    for events in trial.glob("events.out.tfevents*"):
        shutil.copy(events, folder / events.name)


def _flat(document: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= _flat(value, f"{above}{key}/") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _speed(folder: Path) -> dict[str, float]:
    """Slots a second and slots of the whole run, from the last row of its table."""
    with (folder / "progress.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {"slots_per_s": float(last["loop/slots_per_s"]), "slots": float(last["loop/slots"])}


if __name__ == "__main__":
    with reader_may_leave():
        app()
