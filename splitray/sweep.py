"""Perplexity over many channels, codecs, cuts and placements of one model: the table of quality/table.py.

Each cell is an engine of its own, so that what is measured is what would run. The table is written after every cell,
and a sweep that finds it goes on where it ends.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitray.arch import ModelArch
from splitray.channel import NoisyChannel, as_channel
from splitray.codecs import Codec, as_codec
from splitray.errors import InputError
from splitray.model.reading import read_config
from splitray.perplexity import (
    MASKS,
    Request,
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
from splitray.placement import Placement
from splitray.quality.features import PlaceFeatures
from splitray.quality.table import QualityRow, QualityTable
from splitray.route import Route
from splitray.runtime.launch import model_path

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """What was asked for: every channel with every codec at every cut and placement, but not both exact.

    `cuts` are numbers with commas between them, or `all` (1 to L - 1); `channels` may name several values at once,
    as in `loss:0.1/0.2`.
    """

    model: str
    text: str
    out: str | Path
    cuts: str | None = None
    placements: Sequence[str] = ()
    channels: Sequence[str] = ("none",)
    codecs: Sequence[str] = ("none",)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    masks: int = MASKS


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    cut: int | None
    placement: Placement | None


def sweep(request: SweepRequest, *, tell: Tell = lambda done, of: None) -> QualityTable:
    """Measure what the file does not hold yet.

    Args:
        request: see above.
        tell: told how many cells of how many are done.

    Raises:
        InputError: something asked for cannot be, or the file holds another sweep; before anything is measured.
        ModelError: something came out that is not finite.
    """
    config = read_config(model_path(request.model))
    num_layers = config.num_hidden_layers
    at_least("masks", request.masks)
    places = [_Place(f"cut:{p}", p, None) for p in read_cuts(request.cuts, num_layers, request.model)]
    places += [_Place(Path(f).stem, None, Placement.load(f)) for f in request.placements]
    if len({p.name for p in places}) < len(places):
        raise InputError("placements", expected="files of different names", actual=[p.name for p in places],
                         remedy="rename one")  # fmt: skip
    channels = [as_channel(c, seed=request.seed) for text in request.channels for c in alternatives(text)]
    codecs = [as_codec(c) for c in request.codecs]
    if not places:
        raise InputError("cut", expected="a cut or a placement", actual="neither", remedy="give --cut all")
    window, stride = window_and_stride(config, request.window, request.stride)
    ids_T = read_ids(request.model, read_text(request.text), window=window, most=request.tokens)
    head: dict[str, Any] = {
        "model": request.model, "architecture": config.model_type, "num_layers": num_layers,
        "text": Path(request.text).name, "tokens": len(ids_T) - 1, "window": window, "stride": stride,
        "masks": request.masks, "seed": request.seed,
    }  # fmt: skip
    table = _found(request.out, head)
    exact_T = losses(ids_T, whole(request.model, request.dtype), window, stride)
    exact = math.exp(exact_T.mean())
    if table is None:
        table = QualityTable(**head, measured_at=datetime.now(UTC).isoformat(timespec="seconds"), perplexity=exact)
    elif not math.isclose(table.perplexity, exact, rel_tol=1e-4):
        raise _another(request.out, f"an exact perplexity of {exact:.6g}", f"{table.perplexity:.6g}")
    cells = [c for c in itertools.product(places, codecs, channels) if c[1] != "none" or c[2] is not None]
    known = {row.key for row in table.rows}
    for done, (place, codec, channel) in enumerate(cells):
        tell(done, len(cells))
        text = "none" if channel is None else str(channel)
        if (text, codec, place.name) in known:
            continue
        nll_T, features = _measure(request, place, codec, channel, ids_T, window, stride)
        rise_T = nll_T - exact_T
        error = math.exp(rise_T.mean()) * rise_T.std(ddof=1) / math.sqrt(len(rise_T))
        row = QualityRow(
            channel=text, codec=codec, at=place.name, perplexity=math.exp(nll_T.mean()), standard_error=float(error)
        )
        table = replace(table, rows=(*table.rows, row), places={**table.places, place.name: features})
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
        raise InputError("cut", expected="whole numbers with commas between them, or `all`", actual=repr(text),
                         remedy="write for example --cut 3,6,9") from error  # fmt: skip
    for cut in cuts:
        within_layers(cut, num_layers, model)
    return cuts


def alternatives(text: str) -> list[str]:
    """`loss:0.1/0.2,unit=token` as two channels."""
    pieces = re.split(r"([^,:=/]+(?:/[^,:=/]+)+)", text)
    return ["".join(chosen) for chosen in itertools.product(*(p.split("/") for p in pieces))]


def _measure(
    request: SweepRequest,
    place: _Place,
    codec: Codec,
    channel: NoisyChannel | None,
    ids_T: Sequence[int],
    window: int,
    stride: int,
) -> tuple[NDArray[np.float64], PlaceFeatures]:
    """Negative log-likelihood of each token, the mean over the masks."""
    asked = Request(
        model=request.model, text=request.text, cut=place.cut, placement=place.placement, dtype=request.dtype,
        seed=request.seed,
    )  # fmt: skip
    with split(asked, place.cut, codec, channel) as model:
        masks = 1 if channel is None else request.masks
        nll_MT = np.stack([losses(ids_T, of_split(model), window, stride) for _ in range(masks)])
        route, arch = model.engine.route, model.engine.arch
    return nll_MT.mean(0), _features(place, route, arch)


def _features(place: _Place, route: Route, arch: ModelArch) -> PlaceFeatures:
    if place.cut is not None:
        return PlaceFeatures.of_cut(place.cut, arch.num_layers)
    return PlaceFeatures.of_route(route)


def _found(path: str | Path, head: dict[str, Any]) -> QualityTable | None:
    if not Path(path).exists():
        return None
    table = QualityTable.load(path)
    for name, value in head.items():
        if getattr(table, name) != value:
            raise _another(path, f"{name} {value!r}", f"{name} {getattr(table, name)!r}")
    return table


def _another(path: str | Path, expected: str, actual: str) -> InputError:
    return InputError(f"quality table {path}", expected=f"the sweep to go on with: {expected}", actual=actual,
                      remedy="give another file, or ask for the same")  # fmt: skip
