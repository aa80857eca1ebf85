"""What holding weights in few bits costs in quality: relative perplexities that were measured on one model and text.

`python -m splitray.profiling.weight_loss` measures it; planners read it. For another model than the measured one it is
a stand-in, and is called that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from splitray.arch import ModelArch
from splitray.errors import InputError
from splitray.placement import Placement, Shares
from splitray.quality.json_table import above_zero, read_table
from splitray.results import write_whole
from splitray.user_file import UserFile
from splitray.weight_formats import as_format

KINDS = ("attention", "ffn", "tables")
_MEASURE = "measure it with `python -m splitray.profiling.weight_loss`"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLossRow:
    """One measurement: the rest of the model was held in float32."""

    weights: str
    """The format (weight_formats.py)."""
    part: str
    """What was held in it: `all`, `layers:A-B` (half-open, attention and FFN), or one of `KINDS` of all layers."""
    perplexity: float
    standard_error: float
    """Of the relative perplexity: over tokens, each compared with itself in the run in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLossTable:
    """Perplexities of one model on one text by format and part, and in float32 on the same tokens."""

    model: str
    num_layers: int
    text: str
    tokens: int
    window: int
    stride: int
    measured_at: str
    perplexity: float
    rows: tuple[WeightLossRow, ...]

    def rise(self, weights: str, part: str) -> float:
        """Relative rise of perplexity by a format of a part, 0 where it was measured below float32: that is noise.

        Raises:
            InputError: it was not measured.
        """
        if not as_format(weights).is_held:
            return 0.0
        for row in self.rows:
            if (row.weights, row.part) == (weights, part):
                return max(0.0, row.perplexity / self.perplexity - 1)
        raise InputError(
            f"quality of {weights} for {part}",
            expected=f"a measurement of {self.model}",
            actual="none",
            remedy=_MEASURE,
        )

    def piece_loss(self, weights: str, part: Literal["attention", "ffn", "head"], num_layers: int) -> float:
        """What one sub-block of a model of so many layers costs in a format, as if all layers cost alike.

        Parts were measured one by one and need not add up: they share what all of them cost together.
        """
        if not as_format(weights).is_held:
            return 0.0
        kind = "tables" if part == "head" else part
        apart = sum(self.rise(weights, k) for k in KINDS)
        share = self.rise(weights, kind) / apart if apart else 1 / len(KINDS)
        return self.rise(weights, "all") * share / (2 if kind == "tables" else num_layers)

    def layer_share(self, weights: str, depth: float) -> float:
        """How much more (above 1) or less a layer at this depth, 0 to 1, costs than the mean layer."""
        found = [(*map(int, r.part.removeprefix("layers:").split("-")), self.rise(weights, r.part))
                 for r in self.rows if r.weights == weights and r.part.startswith("layers:")]  # fmt: skip
        total = sum(rise for _, _, rise in found)
        at = min(int(depth * self.num_layers), self.num_layers - 1)
        for start, stop, rise in found:
            if start <= at < stop and total:
                return rise / total * self.num_layers / (stop - start)
        return 1.0

    def placement_loss(self, placement: Placement, arch: ModelArch) -> float:
        """The relative rise of perplexity by the formats of all pieces of a placement, summed."""
        layers, total = arch.num_layers, 0.0
        for shares in (Shares.whole(1, *placement.embedding), placement.head):  # half of what tables cost each
            total += sum(share * self.piece_loss(w, "head", layers) for w, share in _shared(shares, arch))
        for i, layer in enumerate(placement.layers):
            for w, share in _shared(layer.attention, arch):
                total += share * self.piece_loss(w, "attention", layers) * self.layer_share(w, i / layers)
            for w, share in _shared(layer.ffn, arch):
                total += share * self.piece_loss(w, "ffn", layers) * self.layer_share(w, i / layers)
        return total

    def save(self, path: str | Path) -> None:
        """Write the table as JSON.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> WeightLossTable:
        """Read a table that `save` wrote.

        Raises:
            InputError: the file cannot be read, or is no such table.
        """
        file = UserFile(path, "table of weights' quality", _MEASURE)
        table = read_table(file, WeightLossTable, WeightLossRow)
        above_zero([table.perplexity, *(r.perplexity for r in table.rows)], file)
        for row in table.rows:
            as_format(row.weights)
        return table


def charged(arch: ModelArch) -> str:
    """The format whose loss a device's weights are charged.

    Whole numbers that are held as they are stored lose nothing themselves; that rows are rounded to 8 bits costs at
    most what `int8` costs.
    """
    return "int8" if arch.as_stored else arch.weights


def _shared(shares: Shares, arch: ModelArch) -> Iterator[tuple[str, float]]:
    """Which share of a sub-block is held in which format; copies count as one."""
    counts = [(charged(arch.on(d)), shares.count(d)) for d in shares.devices]
    total = sum(n for _, n in counts)
    for weights, count in counts:
        yield weights, count / total


def weights_loss(placement: Placement, arch: ModelArch) -> float:
    """What the formats of a placement cost, as the shipped model's measurements tell."""
    return shipped_weight_loss().placement_loss(placement, arch) if any(f.is_held for f in arch.formats) else 0.0


@cache
def shipped_weight_loss() -> WeightLossTable:
    """What was measured on the model that ships with splitray."""
    return WeightLossTable.load(Path(__file__).parents[1] / "model" / "shipped" / "weight_loss.json")
