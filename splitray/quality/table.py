"""Relative perplexities as they were measured: one model, one text, many channels, codecs, cuts and placements.

The file is JSON: the fields of `QualityTable`, `places` being the placement features of each name in `rows` (`cut:6`,
or the name of a placement file), and a row the fields of `QualityRow`. `splitray perplexity --out FILE` measures it.
Relative perplexity is that with the channel over that of the exact model on the same tokens, so it has no unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from splitray.channel import as_channel
from splitray.codecs import Codec
from splitray.errors import InputError, unwritable
from splitray.quality.features import PlaceFeatures
from splitray.quality.json_table import above_zero, read_table
from splitray.results import write_whole
from splitray.user_file import UserFile

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One measurement: the mean over the masks, drawn one after the other under the table's seed."""

    channel: str
    codec: Codec
    at: str
    """Which of the table's places."""
    perplexity: float
    standard_error: float
    """Of the relative perplexity: over tokens, each compared with itself in the exact run."""

    @property
    def key(self) -> tuple[str, str, str]:
        """The question that a row answers: channel, codec, and cut or placement."""
        return self.channel, self.codec, self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTable:
    """See above. `perplexity` is the exact model's; `tokens` were scored, `masks` times under a channel."""

    model: str
    architecture: str
    num_layers: int
    text: str
    tokens: int
    window: int
    stride: int
    masks: int
    seed: int
    measured_at: str
    perplexity: float
    places: Mapping[str, PlaceFeatures] = field(default_factory=dict)
    rows: tuple[QualityRow, ...] = ()
    format: int = FORMAT

    def relative(self, row: QualityRow) -> float:
        """Relative perplexity of a row, 1 being no loss."""
        return row.perplexity / self.perplexity

    def relative_perplexity(self, channel: str, codec: Codec, at: str) -> float:
        """What was measured for this channel, codec and place; nothing is guessed.

        Raises:
            InputError: it was not measured.
        """
        wanted = (channel, codec, at)
        for row in self.rows:
            if row.key == wanted:
                return self.relative(row)
        remedy = "measure it with `splitray perplexity --out FILE`, or ask a surrogate"
        raise InputError("measured perplexity", expected="a row of the table", actual=wanted, remedy=remedy)

    def document(self) -> dict[str, Any]:
        """All of it as plain values, each row with its relative perplexity."""
        rows = [{**asdict(row), "relative_perplexity": self.relative(row)} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; a row takes a line."""
        head = {k: v for k, v in asdict(self).items() if k not in ("rows", "places")}
        places = ",\n".join(f"  {json.dumps(n)}: {json.dumps(_short(asdict(f)))}" for n, f in self.places.items())
        rows = ",\n".join(f"  {json.dumps(_short(asdict(r)))}" for r in self.rows)
        body = json.dumps(head, indent=1).removesuffix("\n}")
        text = f'{body},\n "places": {{\n{places}\n }},\n "rows": [\n{rows}\n ]\n}}\n'
        try:
            write_whole(path, text)
        except OSError as error:
            raise unwritable(f"quality table {path}", error, expected="a file that can be written") from error

    @staticmethod
    def load(path: str | Path) -> QualityTable:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read, or is no such table.
        """
        file = UserFile(path, "quality table", "measure it with `splitray perplexity --out FILE`")
        table = read_table(file, QualityTable, QualityRow)
        if table.format != FORMAT:
            raise file.wrong(f"format {FORMAT}", table.format)
        for row in table.rows:
            as_channel(row.channel)
        above_zero([table.perplexity, *(r.perplexity for r in table.rows)], file)
        if missing := {r.at for r in table.rows} - set(table.places):
            raise file.wrong("features of every place", f"none of {sorted(missing)}")
        return table


def shipped_quality(model: Literal["tiny", "tiny-neox"] = "tiny") -> QualityTable:
    """What was measured on the model that ships with splitray, or on one of another architecture by the same recipe.

    That is `python -m splitray.model.tiny --architecture gpt_neox --out DIR`, which does not ship.
    """
    return QualityTable.load(Path(__file__).parent / "shipped" / f"{model}.json")


def _short(plain: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in plain.items()}
