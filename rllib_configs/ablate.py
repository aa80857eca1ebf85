"""`python -m rllib_configs.ablate --out DIR`: train every ablation with some seeds, and say what each part is worth."""

if __name__ == "__main__":
    from splitray.signals import heed_signals

    heed_signals()

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from rllib_configs.__main__ import RECIPES
from splitray.evaluate.shared_cloud import mean_and_interval
from splitray.local_ray import nothing_left
from splitray.report.boundary import told_errors
from splitray.report.document import Number, Report, Table
from splitray.report.progress import bar
from splitray.report.stdout import reader_may_leave
from splitray.results import RECORD, result_folder
from splitray.user_file import UserFile

_END_S = 8.0
REFERENCE = "fifth"
_WHOLE = ("splitwise", "splitwise_smoke")  # no ablations

app = typer.Typer(add_completion=False)


@app.command()
@told_errors()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs; those that are finished there are not done again.")],
    seeds: Annotated[int, typer.Option(min=2, help="Of every recipe.")] = 3,
    only: Annotated[str, typer.Option(help="Recipes, with commas; all by default.")] = "",
) -> None:
    """Train, compare on weather of families that no training saw, and write DIR/report.md, .json and .html."""
    names = [n for n in only.split(",") if n] or [n for n in RECIPES if n not in _WHOLE]
    if unknown := [n for n in names if n not in RECIPES]:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected of {', '.join(RECIPES)}", param_hint="--only")
    console, runs = Console(stderr=True), [(seed, name) for seed in range(seeds) for name in names]
    with result_folder(out), bar(console, "ablations") as told:
        for done, (seed, name) in enumerate(runs):
            told(done, len(runs))
            if not _card(out, name, seed).is_file():
                _train(out, name, seed)
        told(len(runs), len(runs))
    report = Report(
        title="What each part of the learned policy is worth",
        facts={"seeds": seeds, "budget": "a fifth of the shipped recipe's (README of rllib_configs)"},
        tables=(compared(out, names, seeds),),
    )
    report.save(out)
    print(report.markdown())


def compared(out: Path, names: list[str], seeds: int) -> Table:
    """A row a recipe: its latency over the exact program's, geometric mean over cells and climates, by cell and all."""
    cells: list[str] = []
    rows: list[tuple[str | Number, ...]] = []
    for name in names:
        by_cell: dict[str, list[list[float]]] = {}
        for seed in range(seeds):
            card = UserFile(_card(out, name, seed), "card", "train it again").json()
            for row in card["results"]["held_out"]:
                by_cell.setdefault(row["cell"], [[] for _ in range(seeds)])[seed].append(np.log(row["over_program"][0]))
        cells = list(by_cell)
        means = np.array([[np.mean(by_cell[c][s]) for c in cells] for s in range(seeds)])
        values = [_ratio(np.exp(means[:, i])) for i in range(len(cells))]
        rows.append((name, _ratio(np.exp(means.mean(1))), *values))
    return Table(
        "Mean latency over that of the exact program as it is",
        ("recipe", "all cells", *cells),
        tuple(rows),
        f"Geometric means over three held-out climates, 95 % intervals over {seeds} seeds (Student). "
        "Below 1 the policy is faster. All recipes but `fifth` change one thing, see the README of rllib_configs.",
    )


def _ratio(values: np.ndarray) -> Number:
    mean, half = mean_and_interval(values)
    return Number(mean, "ratio", "simulated", f"{mean:.3f} ± {half:.3f}")


def _card(out: Path, name: str, seed: int) -> Path:
    return out / f"seed{seed}" / name / "policy.json"


def _train(out: Path, name: str, seed: int) -> None:
    """Each in a process of its own.

    Raises:
        Exit: it failed.
    """
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rllib_configs", name, "--out", str(folder), "--seed", str(seed)]
    if (folder / name / RECORD).is_file():
        command.append("--resume")
    with (
        (folder / f"{name}.log").open("a", encoding="utf-8") as log,
        nothing_left(),
        subprocess.Popen(command, stdout=log, stderr=log) as run,
    ):
        try:
            code = run.wait()
        except BaseException:  # a signal: the run knows best what it has started
            run.terminate()
            with suppress(subprocess.TimeoutExpired):
                run.wait(_END_S)
            raise
        if code:
            print(f"error: {name} with seed {seed} failed, see {log.name}", file=sys.stderr)
            raise typer.Exit(1)


if __name__ == "__main__":
    with reader_may_leave():
        app()
