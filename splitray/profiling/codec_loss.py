"""Measures what each codec costs a model at each cut: the table of quality/accuracy.py.

``python -m splitray.profiling.codec_loss --model tiny --out FILE`` takes the documentation of this Python
that the shipped model was not trained on; ``--text FILE`` takes another text.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from splitray.codecs import CODECS, Codec, as_codec
from splitray.errors import InputError
from splitray.model.reading import read_config
from splitray.model.training.corpus import installation_documents
from splitray.model.training.corpus import split as split_documents
from splitray.profiling.perplexity import Progress, losses, of_split, read_ids, read_text, whole, window_and_stride
from splitray.quality.accuracy import AccuracyRow, AccuracyTable
from splitray.report.stdout import reader_may_leave
from splitray.runtime.hf import SplitModel
from splitray.runtime.launch import model_path

HELD_OUT = "held-out documentation of this Python"


def measure(
    model: str,
    text: str,
    *,
    about: str,
    cuts: Sequence[int | None],
    codecs: Sequence[Codec] = CODECS[1:],
    most_tokens: int = 4096,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress = lambda _: None,
) -> AccuracyTable:
    """Score a text once exactly and once for each codec and cut, always in float32.

    Only the text's first `most_tokens` tokens are predicted; `about` is one phrase on it, kept in the table. A cut is a
    number of layers on the edge; None partitions every sub-block evenly over two devices. `window` and `stride` are
    those of `Scoring`; `progress` is told each result.

    Raises:
        InputError: what `splitray perplexity` refuses.
    """
    config = read_config(model_path(model))
    ids_T = read_ids(model, text)[:most_tokens]
    size, step = window_and_stride(config, window, stride)
    exact_T = losses(ids_T, whole(model, "float32"), size, step)
    progress(f"exact: {math.exp(exact_T.mean()):.4f} over {len(exact_T)} tokens")
    rows = []
    for cut in cuts:
        planner = "even" if cut is None else f"fixed_cut:{cut}"
        for codec in codecs:
            with SplitModel.from_pretrained(model, devices=2, planner=planner, runtime="local", codec=codec) as parts:
                row = _row(codec, cut, losses(ids_T, of_split(parts), size, step), exact_T)
            rows.append(row)
            relative = row.perplexity / math.exp(exact_T.mean())
            progress(f"{codec} at {'all' if cut is None else cut}: {relative:.5f} +- {row.standard_error:.5f}")
    return AccuracyTable(
        model=model, num_layers=config.num_hidden_layers, text=about, tokens=len(exact_T), window=size, stride=step,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), perplexity=math.exp(exact_T.mean()),
        rows=tuple(rows),
    )  # fmt: skip


def _row(codec: Codec, cut: int | None, nll_T: NDArray[np.float64], exact_T: NDArray[np.float64]) -> AccuracyRow:
    rise_T = nll_T - exact_T
    error = math.exp(rise_T.mean()) * rise_T.std(ddof=1) / math.sqrt(len(rise_T))
    return AccuracyRow(codec=codec, cut=cut, perplexity=math.exp(nll_T.mean()), standard_error=error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a table and write it; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m splitray.profiling.codec_loss", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--cuts", metavar="P,P,all", help="default: every cut, and all sub-blocks partitioned")
    parser.add_argument("--codecs", default=",".join(CODECS[1:]))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--out", metavar="FILE", required=True)
    asked = parser.parse_args(arguments)
    try:
        layers = read_config(model_path(asked.model)).num_hidden_layers
        cuts = _cuts(asked.cuts) if asked.cuts else [*range(1, layers), None]
        codecs = [as_codec(c) for c in asked.codecs.split(",")]
        text = read_text(asked.text) if asked.text else held_out()
        table = measure(
            asked.model,
            text,
            about=asked.text or HELD_OUT,
            cuts=cuts,
            codecs=codecs,
            most_tokens=asked.tokens,
            window=asked.window,
            stride=asked.stride,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        table.save(asked.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _cuts(text: str) -> list[int | None]:
    try:
        return [None if part == "all" else int(part) for part in text.split(",")]
    except ValueError as error:
        expected, remedy = "whole numbers or `all`, with commas between them", "write for example --cuts 3,6,9,all"
        raise InputError("--cuts", expected=expected, actual=repr(text), remedy=remedy) from error


def held_out() -> str:
    """The text that no shipped model was trained on."""
    return "\n\n".join(document.text for document in split_documents(installation_documents()).held_out)


if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main())
