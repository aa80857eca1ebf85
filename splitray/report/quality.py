"""A table of measured relative perplexities, for the terminal."""

from rich.table import Table

from splitray.quality.table import QualityTable


def quality_tables(measured: QualityTable) -> list[Table]:
    """Channels by cuts, and channels by placements, where there are such."""
    cuts = [name for name in measured.places if name.startswith("cut:")]
    others = [name for name in measured.places if name not in cuts]
    title = (
        f"relative perplexity of {measured.model} on {measured.text} (exact: {measured.perplexity:.4g}, "
        f"{measured.tokens:,} tokens, {measured.masks} masks)"
    )
    return [_table(measured, names, title) for names in (cuts, others) if names]


def _table(measured: QualityTable, names: list[str], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    known = {row.key: row for row in measured.rows}
    kinds = dict.fromkeys((row.channel, row.codec) for row in measured.rows if row.at in names)
    table.add_column("at")
    for channel, codec in kinds:
        parts = [*([channel] if channel != "none" else []), *([codec] if codec != "none" else [])]
        table.add_column(" ".join(parts), justify="right", overflow="fold")
    for name in names:
        rows = [known.get((*kind, name)) for kind in kinds]
        table.add_row(name.removeprefix("cut:"), *("" if r is None else f"{measured.relative(r):.3f}" for r in rows))
    return table
