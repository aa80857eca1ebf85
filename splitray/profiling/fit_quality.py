"""Fits the surrogate of quality/surrogate.py to measured tables.

``python -m splitray.profiling.fit_quality --table FILE [--table FILE] --out NAME`` writes NAME.safetensors and
NAME.json, and prints how well it does on rows that it has not seen, by cross-validation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from splitray.errors import InputError
from splitray.quality.surrogate import FOLDS, HIDDEN, STEPS, Record, Surrogate, records_of
from splitray.quality.table import QualityTable
from splitray.report.stdout import reader_may_leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit and write; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m splitray.profiling.fit_quality", description=__doc__)
    parser.add_argument("--table", action="append", required=True, metavar="FILE", help="may be given again")
    parser.add_argument("--out", required=True, metavar="NAME", help="without an ending")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    if min(asked.hidden, asked.steps) < 1 or asked.folds < 2 or asked.seed < 0:
        parser.error("expected --hidden and --steps of at least 1, --folds of 2, --seed of 0")
    try:
        tables = [QualityTable.load(path) for path in asked.table]
        models = [table.model for table in tables]
        if len(set(models)) < len(models):
            expected = "one table a model: texts differ in what they lose"
            raise InputError("--table", expected=expected, actual=models, remedy="fit one surrogate a text")
        records: list[Record] = [record for table in tables for record in records_of(table)]
        surrogate = Surrogate.fit(records, hidden=asked.hidden, steps=asked.steps, seed=asked.seed, folds=asked.folds)
        about = "; ".join(f"{t.model} on {t.text}, {t.tokens} tokens, {t.masks} masks" for t in tables)
        surrogate.save(Path(asked.out), about=about)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for name, m in surrogate.metrics.items():
        print(f"{name}: {m.rows} held-out rows, MSE {m.mse:.5f}, MAE {m.mae:.4f}, R2 {m.r2:.4f} ({m.unit})")
    return 0


if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main())
