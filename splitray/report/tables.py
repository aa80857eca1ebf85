"""The two kinds of tables that a terminal shows: facts under their names, and figures in columns."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """A fact a line, after its dim name."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    for fact in facts:
        table.add_row(*fact)
    return table


def columns_table(columns: Sequence[str], *, named: int = 1) -> Table:
    """A table with a line below its heads; the first `named` columns are texts, the others figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", border_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < named else "right")
    return table
