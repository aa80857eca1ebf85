"""What became of each family of transformers, as the page docs/families.md and for the terminal."""

from collections.abc import Iterable, Iterator, Mapping
from textwrap import fill
from typing import Any

from rich.console import Console

from splitray.report.tables import columns_table

_TITLES = {
    "exact": "Exact",
    "wrong": "Wrong",
    "crashed": "Crashed",
    "refused": "Refused",
    "untried": "Not to be tried: transformers itself does not run the small model",
}
_INTRODUCTION = """\
# Families of models

Written by `splitray bench --suite families --out docs/families.md`, never by hand: what came of trying every family
of text decoders that transformers {transformers} has a causal language model for. A wrapper for images is tried for its
text and does not count as a family of its own.

{left_out}

Each family is made as a small random model with every kind of layer that its usual config has (dense and mixture,
window and full, layers that share KV) and windows of 64 tokens; weights, biases and corrections all matter. It is
saved, read again as a user reads it, and continues a prompt of 12 tokens, and one of 700 where its context allows, by
16 tokens: once whole in transformers, and once split over three devices in float32, by a random placement with uneven
shares, ranges apart, replicas, and embedding and head on different devices.

- **Exact**: all tokens are the same. *Grain*: the pieces of a layer that a placement moves, head groups and FFN columns
  or experts. *Lean*: single tokens take the engine's own loop over the modules; otherwise transformers' own layer code.
- **Refused**: a clear error, and nothing is generated; the column says what stops it.

| exact | refused | wrong | crashed | not to be tried | families |
|---|---|---|---|---|---|
| {exact} | {refused} | {wrong} | {crashed} | {untried} | {all} |
"""


def families_table(console: Console, document: dict[str, Any]) -> None:
    """The counts, and a line for each family that is not exact."""
    rows = [row for part in ("families", "wrappers", "variants") for row in document[part].items()]
    several = len(rows) > 20
    shown = [(n, r) for n, r in rows if not several or r["outcome"] != "exact"]
    table = columns_table(("family", "outcome", "grain", "lean", "why"), named=5)
    for name, result in shown:
        table.add_row(name, result["outcome"], result.get("grain", ""), _lean(result), result.get("why", ""))
    console.print(table)
    console.print(", ".join(f"{n} {outcome}" for outcome, n in document["counts"].items()))


def families_page(document: Mapping[str, Any]) -> str:
    """The Markdown page."""
    counts = document["counts"]
    reasons = (f"{reason} ({len(names)})" for reason, names in document["left_out"].items())
    left_out = fill(f"Left out of its list: {', '.join(reasons)}.", 118)
    parts = [_INTRODUCTION.format(transformers=document["transformers"], left_out=left_out, **counts,
                                  all=sum(counts.values()))]  # fmt: skip
    for outcome, title in _TITLES.items():
        rows = [(n, r) for n, r in document["families"].items() if r["outcome"] == outcome]
        if rows:
            parts.append(f"\n## {title}\n\n{''.join(_lines(outcome, rows))}")
    for part, title in (("wrappers", "Wrappers, read for their text"), ("variants", "Other wirings of some families")):
        if document[part]:
            parts.append(f"\n## {title}\n\n| model | outcome | grain | lean | why |\n|---|---|---|---|---|\n")
            parts += [f"| `{n}` | {r['outcome']} | {r.get('grain', '')} | {_lean(r)} | {_cell(r.get('why', ''))} |\n"
                      for n, r in document[part].items()]  # fmt: skip
    return "".join(parts)


def _lines(outcome: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    if outcome == "exact":
        yield "| family | model | grain | lean | prompts |\n|---|---|---|---|---|\n"
        for name, r in rows:
            prompts = ", ".join(str(n) for n in r["prompts"])
            yield f"| `{name}` | `{r['class']}` | {r.get('grain', '')} | {_lean(r)} | {prompts} |\n"
    else:
        yield "| family | model | why | after | devices |\n|---|---|---|---|---|\n"
        for name, r in rows:
            after = (
                f"{r['after_s']:.1f} s | {'started' if r['started'] else 'not started'}" if "after_s" in r else " | "
            )
            yield f"| `{name}` | `{r.get('class', '')}` | {_cell(r.get('why', ''))} | {after} |\n"


def _lean(result: Mapping[str, Any]) -> str:
    return "" if "lean" not in result else "yes" if result["lean"] else "no"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= 240 else f"{text[:237]}..."
