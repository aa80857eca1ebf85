"""Perplexity over many channels, codecs, cuts and placements of one model: the table of quality/table.py.

Each cell is an engine of its own, so that what is measured is what would run. The table is written after every cell,
and a sweep that finds it goes on where it ends. `PerplexityMeter` measures single cells for whoever learns from them.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from splitray.channel import NoisyChannel, as_channel
from splitray.codecs import Codec, as_codec
from splitray.errors import InputError
from splitray.model.reading import read_config
from splitray.placement import Placement
from splitray.profiling.perplexity import (
    PerplexityRequest,
    Scoring,
    at_least,
    losses,
    of_split,
    read_ids,
    read_text,
    split,
    whole,
    window_and_stride,
    within_layers,
)
from splitray.quality.features import PlaceFeatures
from splitray.quality.table import QualityRow, QualityTable
from splitray.runtime.launch import model_path

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest(Scoring):
    """What was asked for: every channel with every codec at every cut and placement, but not both exact.

    `cuts` are numbers with commas between them, or `all` (1 to L - 1); `channels` may name several values at once,
    as in `loss:0.1/0.2`.
    """

    out: str | Path
    cuts: str | None = None
    placements: Sequence[str] = ()
    channels: Sequence[str] = ("none",)
    codecs: Sequence[str] = ("none",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement; the error is of the relative perplexity, over tokens."""

    perplexity: float
    relative_perplexity: float
    standard_error: float
    place: PlaceFeatures


class PerplexityMeter:
    """Measures one model on one text, again and again."""

    def __init__(self, asked: Scoring) -> None:
        """Read both and score the exact model.

        Raises:
            InputError: they cannot be used as asked.
            ModelError: no such model, or it gave something that is not finite.
        """
        self.asked, self.config = asked, read_config(model_path(asked.model))
        at_least("masks", asked.masks)
        self.window, self.stride = window_and_stride(self.config, asked.window, asked.stride)
        self.ids_T = read_ids(asked.model, read_text(asked.text), window=self.window, most=asked.tokens)
        self.exact_T = losses(self.ids_T, whole(asked.model, asked.dtype), self.window, self.stride)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of the model."""
        return self.config.num_hidden_layers

    @property
    def perplexity(self) -> float:
        """Perplexity of the exact model on the text."""
        return math.exp(self.exact_T.mean())

    def measure(self, at: int | Placement, channel: NoisyChannel | None, codec: Codec = "none") -> Measured:
        """Perplexity at a cut or with a placement; each of the masks follows from the channel's seed.

        Raises:
            InputError: a cut or a placement that is none of this model.
            ModelError: something came out that is not finite.
        """
        cut, placement = (at, None) if isinstance(at, int) else (None, at)
        asked = self.asked
        if cut is not None:
            within_layers(cut, self.num_layers, asked.model)
        one = PerplexityRequest(model=asked.model, text=asked.text, placement=placement, dtype=asked.dtype)
        with split(one, cut, codec, channel) as parts:
            masks = 1 if channel is None else asked.masks
            nll_T = np.mean(
                [losses(self.ids_T, of_split(parts), self.window, self.stride) for _ in range(masks)], axis=0
            )
            route = parts.engine.route
        rise_T = nll_T - self.exact_T
        relative = math.exp(rise_T.mean())
        return Measured(
            perplexity=math.exp(nll_T.mean()),
            relative_perplexity=relative,
            standard_error=relative * float(rise_T.std(ddof=1)) / math.sqrt(len(rise_T)),
            place=PlaceFeatures.of_route(route) if cut is None else PlaceFeatures.of_cut(cut, self.num_layers),
        )


def sweep(request: SweepRequest, *, tell: Tell = lambda done, of: None) -> QualityTable:
    """Measure what the file does not hold yet.

    `tell` is told how many cells of how many are done.

    Raises:
        InputError: something asked for cannot be, or the file holds another sweep; before anything is measured.
        ModelError: something came out that is not finite.
    """
    num_layers = read_config(model_path(request.model)).num_hidden_layers
    places: list[tuple[str, int | Placement]] = [
        (f"cut:{p}", p) for p in read_cuts(request.cuts, num_layers, request.model)
    ]
    places += [(Path(f).stem, Placement.load(f)) for f in request.placements]
    names = [name for name, _ in places]
    if len(set(names)) < len(names):
        raise InputError("placements", expected="files of different names", actual=names, remedy="rename one")
    channels = [as_channel(c, seed=request.seed) for text in request.channels for c in alternatives(text)]
    codecs = [as_codec(c) for c in request.codecs]
    if not places:
        raise InputError("cut", expected="a cut or a placement", actual="neither", remedy="give --cut all")
    cells = [c for c in itertools.product(places, codecs, channels) if c[1] != "none" or c[2] is not None]
    if not cells:
        expected, remedy = "a channel or a codec", "write for example --channel loss:0.1/0.2"
        raise InputError("channel", expected=expected, actual="neither: nothing would be lost", remedy=remedy)
    before = QualityTable.load(request.out) if Path(request.out).exists() else None
    meter = PerplexityMeter(request)
    table = QualityTable(
        model=request.model, architecture=meter.config.model_type, num_layers=num_layers, text=Path(request.text).name,
        tokens=len(meter.exact_T), window=meter.window, stride=meter.stride, masks=request.masks, seed=request.seed,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), perplexity=meter.perplexity,
    )  # fmt: skip
    if before is not None:
        _the_same(before, table, request.out)
        table = before
    table.save(request.out)  # a file that cannot be written is refused before the first cell takes its time
    known = {row.key for row in table.rows}
    for done, ((name, at), codec, channel) in enumerate(cells):
        tell(done, len(cells))
        text = "none" if channel is None else str(channel)
        if (text, codec, name) in known:
            continue
        found = meter.measure(at, channel, codec)
        row = QualityRow(
            channel=text, codec=codec, at=name, perplexity=found.perplexity, standard_error=found.standard_error
        )
        table = replace(table, rows=(*table.rows, row), places={**table.places, name: found.place})
        table.save(request.out)
    tell(len(cells), len(cells))
    return table


def read_cuts(text: str | None, num_layers: int, model: str) -> list[int]:
    """Cuts as a user writes them; `all` leaves out 0 and L, where one device has every layer.

    Raises:
        InputError: no numbers, or beyond the model.
    """
    if text is None:
        return []
    if text == "all":
        return list(range(1, num_layers))
    try:
        cuts = [int(part) for part in text.split(",")]
    except ValueError as error:
        expected = "whole numbers with commas between them, or `all`"
        raise InputError("cut", expected=expected, actual=repr(text), remedy="write for example --cut 3,6,9") from error
    for cut in cuts:
        within_layers(cut, num_layers, model)
    return cuts


def alternatives(text: str) -> list[str]:
    """`loss:0.1/0.2,unit=token` as the two channels that it means."""
    pieces = re.split(r"([^,:=/]+(?:/[^,:=/]+)+)", text)
    return ["".join(chosen) for chosen in itertools.product(*(p.split("/") for p in pieces))]


def _the_same(before: QualityTable, now: QualityTable, path: str | Path) -> None:
    """Refuse a file that another sweep has written."""
    for name in ("model", "architecture", "num_layers", "text", "tokens", "window", "stride", "masks", "seed"):
        if getattr(before, name) != getattr(now, name):
            raise _another(path, f"{name} {getattr(now, name)!r}", f"{name} {getattr(before, name)!r}")
    if not math.isclose(before.perplexity, now.perplexity, rel_tol=1e-4):
        raise _another(path, f"an exact perplexity of {now.perplexity:.6g}", f"{before.perplexity:.6g}")


def _another(path: str | Path, expected: str, actual: str) -> InputError:
    expected, remedy = f"the sweep to go on with: {expected}", "give another file, or ask for the same"
    return InputError(f"quality table {path}", expected=expected, actual=actual, remedy=remedy)
