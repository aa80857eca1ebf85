"""A report of tables and plots in which every number says where it comes from; as JSON, Markdown and HTML.

A bare number in a table is refused: it must be a `Number`, which carries its provenance.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from splitray.errors import unwritable
from splitray.report.plots import save_plots
from splitray.report.quantities import bytes_text, joule_text, seconds_text
from splitray.results import write_whole

Provenance = Literal["paper", "second-hand", "measured", "simulated", "predicted"]
Unit = Literal["s", "J", "B", "share", "ratio", "count", "tokens", ""]
MARKS: dict[Provenance, str] = {"paper": "P", "second-hand": "H", "measured": "M", "simulated": "S", "predicted": "C"}
LEGEND = (
    "P stated in a paper · H reported of a paper at second hand · M ours, measured on this machine · "
    "S ours, simulated · C ours, computed from the cost model without a simulation"
)


@dataclass(frozen=True, slots=True)
class Number:
    """One figure: SI value (None: there is none), unit, and how it came about; `text` where it is a range."""

    value: float | None
    unit: Unit
    provenance: Provenance
    text: str = ""

    def __str__(self) -> str:
        return f"{self.shown} {MARKS[self.provenance]}" if self.value is not None or self.text else "-"

    @property
    def shown(self) -> str:
        """The number with its unit as a person reads it, without the mark of where it comes from."""
        if self.text:
            return self.text
        if self.value is None:
            return "-"
        match self.unit:
            case "s":
                return seconds_text(self.value)
            case "J":
                return joule_text(self.value)
            case "B":
                return bytes_text(self.value)
            case "share":
                return f"{100 * self.value:.1f} %"
            case "ratio":
                return f"{self.value:.2f}x"
            case "count":
                return f"{self.value:,.0f}"
            case _:
                return f"{self.value:.4g}"


Cell = str | Number


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a title; `note` says how the table was made and how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: expected {len(self.columns)} cells, got {len(row)}: {row}")
            for cell in row:
                if not isinstance(cell, str | Number):
                    raise ValueError(f"{self.title}: expected a text or a Number with its provenance, got {cell!r}")


@dataclass(frozen=True, slots=True)
class Report:
    """What a suite found: facts about the run, tables in order, plots by name with a caption."""

    title: str
    facts: Mapping[str, Any]
    tables: tuple[Table, ...]
    plots: Mapping[str, Figure] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The JSON document: every number with unit and provenance."""
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "provenance": LEGEND,
            "tables": [
                {
                    "title": t.title,
                    "note": t.note,
                    "columns": list(t.columns),
                    "rows": [[_cell(c) for c in row] for row in t.rows],
                }
                for t in self.tables
            ],
            "plots": [f"{name}.png" for name in self.plots],
        }

    def markdown(self) -> str:
        """The report as Markdown, for a terminal and for a repository."""
        lines = [f"# {self.title}", "", *(f"- {k}: {v}" for k, v in self.facts.items()), "", LEGEND, ""]
        for table in self.tables:
            lines += [f"## {table.title}", "", *([table.note, ""] if table.note else [])]
            lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
            lines += ["| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in table.rows]
            lines.append("")
        for name in self.plots:
            lines += [f"![{self.captions.get(name, name)}]({name}.png)", "", self.captions.get(name, ""), ""]
        return "\n".join(lines)

    def html(self) -> str:
        """One page that needs nothing but the PNG files beside it."""
        body = [f"<h1>{html.escape(self.title)}</h1>", "<dl>"]
        body += [f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in self.facts.items()]
        body += ["</dl>", f"<p class=legend>{html.escape(LEGEND)}</p>"]
        for table in self.tables:
            body.append(f"<h2>{html.escape(table.title)}</h2>")
            if table.note:
                body.append(f"<p>{html.escape(table.note)}</p>")
            head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
            rows = "".join("<tr>" + "".join(_html_cell(c) for c in row) + "</tr>" for row in table.rows)
            body.append(f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>")
        for name in self.plots:
            caption = html.escape(self.captions.get(name, name))
            body.append(f'<figure><img src="{name}.png" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(self.title)}</title>"
            f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
        )

    def save(self, folder: Path) -> list[Path]:
        """Write report.json, report.md, report.html and the plots.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            files = {
                "report.json": json.dumps(self.document(), indent=1) + "\n",
                "report.md": self.markdown(),
                "report.html": self.html(),
            }
            for name, text in files.items():
                write_whole(folder / name, text)
            return [*(folder / n for n in files), *save_plots(self.plots, folder)]
        except OSError as error:
            raise unwritable("--out", error) from error


def _cell(cell: Cell) -> Any:
    if isinstance(cell, str):
        return cell
    found: dict[str, Any] = {"value": cell.value, "unit": cell.unit, "provenance": cell.provenance}
    return {**found, "text": cell.text} if cell.text else found


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    if cell.value is None and not cell.text:
        return "<td class=n>-</td>"
    mark = MARKS[cell.provenance]
    return f'<td class=n title="{cell.provenance}">{html.escape(cell.shown)} <sup>{mark}</sup></td>'


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;font-size:.85rem}"
    "th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}th{color:#666}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}sup{color:#999;font-size:.65em}.wide{overflow-x:auto}"
    ".legend{color:#666;font-size:.85rem}img{max-width:100%}figure{margin:2rem 0}"
    "figcaption{color:#666;font-size:.85rem}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.85rem}dt{color:#666}dd{margin:0}"
)
