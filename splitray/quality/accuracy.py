"""What a codec costs in quality: a table of relative perplexities that were measured on one model and one text.

`python -m splitray.profiling.codec_loss` measures it; planners read it. Nothing is extrapolated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.quality.json_table import above_zero, read_table
from splitray.results import write_whole
from splitray.route import Route
from splitray.user_file import UserFile


class Accuracy(Protocol):
    """What planners ask: the relative rise of perplexity by what crosses, exact crossings costing 0."""

    def boundary_loss(self, codec: Codec, depth: float, boundaries: int) -> tuple[float, float]:
        """Relative rise by one whole state at a depth, and by the partial sums of one boundary."""

    def route_loss(self, route: Route) -> float:
        """Relative rise of perplexity by everything that a route lets cross in this codec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """One measurement. `cut`: layers on the edge; None where all sub-blocks are partitioned over two devices."""

    codec: Codec
    cut: int | None
    perplexity: float
    standard_error: float
    """Of the relative perplexity: over tokens, each compared with itself in the exact run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyTable:
    """Perplexities of one model on one text by codec and cut, and of the exact model on the same tokens."""

    model: str
    num_layers: int
    text: str
    tokens: int
    window: int
    stride: int
    measured_at: str
    perplexity: float
    rows: tuple[AccuracyRow, ...]

    def relative_perplexity(self, codec: Codec, cut: int | None) -> float:
        """Perplexity with this codec at this cut over the exact one; 1 for `none`, which is exact.

        A cut between two measured ones counts as the worse of them.

        Raises:
            InputError: nothing was measured for this codec, or not on both sides of this cut.
        """
        if codec == "none":
            return 1.0
        measured = {r.cut: r.perplexity / self.perplexity for r in self.rows if r.codec == codec}
        if cut in measured:
            return measured[cut]
        cuts = [c for c in measured if c is not None]
        below = [c for c in cuts if cut is not None and c < cut]
        above = [c for c in cuts if cut is not None and c > cut]
        if not below or not above:
            raise InputError(
                f"accuracy of {codec} at {'every sub-block' if cut is None else f'cut {cut}'}",
                expected=f"one of the measured cuts {list(measured)} of {self.model}, or one between them",
                actual="no measurement",
                remedy="measure it with `python -m splitray.profiling.codec_loss`",
            )
        return max(measured[max(below)], measured[min(above)])

    def boundary_loss(self, codec: Codec, depth: float, boundaries: int) -> tuple[float, float]:
        """The relative rise of perplexity by one coded crossing, of a whole state and of partial sums.

        The first is what the cut nearest to this depth was measured to cost; the second is the measured cost of coding
        every boundary, spread evenly. A measurement below the exact perplexity is noise and counts as 0, so that no
        planner is paid for it. For another model than the measured one this is a stand-in, and is called that.

        `depth` is the share of the model before the crossing, 0 to 1; `boundaries` are of the model at hand.
        """
        if codec == "none":
            return 0.0, 0.0
        cuts = [r.cut for r in self.rows if r.codec == codec and r.cut is not None]
        nearest = min(cuts, key=lambda c: abs(c / self.num_layers - depth))
        everywhere = max(0.0, self.relative_perplexity(codec, None) - 1)
        return max(0.0, self.relative_perplexity(codec, nearest) - 1), everywhere / max(1, boundaries)

    def route_loss(self, route: Route) -> float:
        """The relative rise of perplexity by all coded crossings of a route, summed; 0 for a codec that is exact."""
        blocks, total = route.sub_blocks, 0.0
        if route.codec == "none":
            return total
        for block, boundary in ((blocks[b.after], b) for b in route.boundaries if b.after + 1 < len(blocks)):
            if boundary.messages and not boundary.inner and block.kind != "embedding":
                at = self.boundary_loss(route.codec, block.index / (len(blocks) - 1), len(blocks) - 2)
                total += at[block.mode == "partitioned"]
        return total

    def save(self, path: str | Path) -> None:
        """Write the table as JSON.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> AccuracyTable:
        """Read a table that `save` wrote.

        Raises:
            InputError: the file cannot be read, or is no such table.
        """
        file = UserFile(path, "accuracy table", "measure it with `python -m splitray.profiling.codec_loss`")
        table = read_table(file, AccuracyTable, AccuracyRow)
        above_zero([table.perplexity, *(r.perplexity for r in table.rows)], file)
        return table


def shipped_table() -> AccuracyTable:
    """What was measured on the model that ships with splitray."""
    return AccuracyTable.load(Path(__file__).parents[1] / "model" / "shipped" / "accuracy.json")
