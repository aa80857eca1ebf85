"""Measures what each format of weights costs a model, whole and in parts: the table of quality/weight_loss.py.

``python -m splitray.profiling.weight_loss --model tiny --out FILE`` takes the documentation of this Python that the
shipped model was not trained on; ``--text FILE`` takes another text.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from splitray.arch import ModelArch
from splitray.errors import InputError
from splitray.model.reading import read_arch, read_config
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.profiling.codec_loss import HELD_OUT, held_out
from splitray.profiling.perplexity import Progress, losses, of_split, read_ids, read_text, whole, window_and_stride
from splitray.quality.weight_loss import KINDS, WeightLossRow, WeightLossTable
from splitray.report.stdout import reader_may_leave
from splitray.runtime.hf import SplitModel
from splitray.runtime.launch import model_path
from splitray.topology import Topology
from splitray.weight_formats import FORMATS, as_format

RANGES = 4  # of layers
HELD = tuple(name for name, kind in FORMATS.items() if kind.is_held)


def parts_of(num_layers: int) -> list[str]:
    """The whole, a few ranges of layers, and the kinds of sub-blocks."""
    edges = [round(i * num_layers / RANGES) for i in range(RANGES + 1)]
    ranges = [f"layers:{a}-{b}" for a, b in zip(edges, edges[1:], strict=False) if a < b]
    return ["all", *ranges, *KINDS]


def placed(part: str, arch: ModelArch) -> Placement:
    """A part of the model on `edge0`, and all else on `cloud0`."""
    few, rest = Topology.uniform(2).ids

    def at(name: str, layer: int = -1) -> Shares:
        start, _, stop = part.removeprefix("layers:").partition("-")
        inside = part in ("all", name) or (part.startswith("layers:") and int(start) <= layer < int(stop))
        total = {"attention": arch.num_kv_heads, "ffn": arch.ffn_dim, "tables": arch.vocab}[name]
        return Shares.whole(total, few if inside else rest)

    layers = tuple(LayerPlacement(at("attention", i), at("ffn", i)) for i in range(arch.num_layers))
    tables = at("tables")
    return Placement(layers, tables.devices, tables)


def measure(
    model: str,
    text: str,
    *,
    about: str,
    formats: Sequence[str] = HELD,
    most_tokens: int = 4096,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress = lambda _: None,
) -> WeightLossTable:
    """Score a text once in float32, and once for each format and part.

    Only the text's first `most_tokens` tokens are predicted; `about` is one phrase on it, kept in the table. `window`
    and `stride` are those of `Scoring`; `progress` is told each result.

    Raises:
        InputError: what `splitray perplexity` refuses, or the model cannot be held in a format.
    """
    config = read_config(model_path(model))
    arch, _ = read_arch(config)
    ids_T = read_ids(model, text)[:most_tokens]
    size, step = window_and_stride(config, window, stride)
    plain_T = losses(ids_T, whole(model, "float32"), size, step)
    perplexity = math.exp(plain_T.mean())
    progress(f"float32: {perplexity:.4f} over {len(plain_T)} tokens")
    rows, two = [], Topology.uniform(2)
    for weights in formats:
        for part in parts_of(arch.num_layers):
            devices = tuple(replace(d, weights=w) for d, w in zip(two.devices, (weights, "float32"), strict=True))
            where = replace(two, devices=devices)
            with SplitModel.from_pretrained(
                model, topology=where, placement=placed(part, arch), runtime="local"
            ) as parts:
                rise_T = losses(ids_T, of_split(parts), size, step) - plain_T
            relative = math.exp(rise_T.mean())
            error = relative * float(rise_T.std(ddof=1)) / math.sqrt(len(rise_T))
            found = perplexity * relative
            rows.append(WeightLossRow(weights=weights, part=part, perplexity=found, standard_error=error))
            progress(f"{weights} for {part}: {relative:.5f} +- {error:.5f}")
    return WeightLossTable(
        model=model, num_layers=arch.num_layers, text=about, tokens=len(plain_T), window=size, stride=step,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), perplexity=perplexity, rows=tuple(rows),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a table and write it; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m splitray.profiling.weight_loss", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--formats", default=",".join(HELD))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--out", metavar="FILE", required=True)
    asked = parser.parse_args(arguments)
    try:
        formats = [as_format(f).name for f in asked.formats.split(",")]
        table = measure(
            asked.model,
            read_text(asked.text) if asked.text else held_out(),
            about=asked.text or HELD_OUT,
            formats=formats,
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


if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main())
