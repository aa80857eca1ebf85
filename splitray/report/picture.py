"""A placement as a picture: layers by head groups and FFN columns, one letter and one colour for each device.

The letters alone tell everything, so that it reads the same in a pipe. Knows no engine and no measured number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from splitray.arch import ModelArch, Range
from splitray.placement import Placement, Shares, weight_bytes
from splitray.report.quantities import bytes_text, share_text
from splitray.report.tables import columns_table
from splitray.topology import DeviceId, Topology

BLOCK_CELLS = 32
_GAP = 2
_LABEL_CELLS = 10
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito, 2008), the text on them legible.
_COLOURS = (
    ("black", "#e69f00"),
    ("white", "#0072b2"),
    ("black", "#009e73"),
    ("black", "#cc79a7"),
    ("black", "#f0e442"),
    ("black", "#56b4e9"),
    ("white", "#d55e00"),
)
_LETTERS = ascii_uppercase + ascii_lowercase
_COPIES = "#%&=+*@~"  # one for each set of devices that hold a full copy of something

Holders = tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the picture: who holds each cell of the left and of the right block.

    Several holders of a cell hold a full copy each. The ends of the model have no heads, so they are one wide block.
    """

    label: str
    left: tuple[Holders, ...]
    right: tuple[Holders, ...] = ()


def rows(placement: Placement, arch: ModelArch) -> list[Row]:
    """The picture as data, from the embedding to the head; layers in a row that are placed alike are one line."""
    heads = min(arch.num_kv_heads, BLOCK_CELLS)
    wide = _cell_width(heads) * heads + _GAP + BLOCK_CELLS
    found = [Row("embedding", (placement.embedding,) * wide)]
    first = 0
    for layer, count in placement.runs():
        left = cells(layer.attention, arch.num_kv_heads, heads)
        label, last = f"layer {first}", first + count - 1
        if count > 1:
            label = f"layers {first}-{last}" if first < 100 else f"{first}-{last}"  # a line has 80 columns
        found.append(Row(label, left, cells(layer.ffn, arch.ffn_dim, min(arch.ffn_dim, BLOCK_CELLS))))
        first += count
    return [*found, Row("head", cells(placement.head, arch.vocab, wide))]


def cells(shares: Shares, total: int, num_cells: int) -> tuple[Holders, ...]:
    """Who holds each of `num_cells` equal parts; where several share one, the device with most of it."""
    if shares.is_replicated(total):
        return (shares.devices,) * num_cells

    def held(device: DeviceId, cell: Range) -> int:
        return sum(max(0, min(r.stop, cell.stop) - max(r.start, cell.start)) for r in shares.ranges(device))

    bounds = [round(i * total / num_cells) for i in range(num_cells + 1)]
    parts = [Range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    return tuple((max(shares.devices, key=partial(held, cell=part)),) for part in parts)


def placement_picture(placement: Placement, arch: ModelArch, topology: Topology) -> RenderableType:
    """The picture and its legend, at most 80 columns wide."""
    drawn = rows(placement, arch)
    used = placement.devices
    few = [d for d in topology.ids if len(topology.ids) <= len(_LETTERS) or d in used]
    marks = _Marks(few, drawn)
    heads = min(arch.num_kv_heads, BLOCK_CELLS)
    width = _cell_width(heads)
    units = "experts" if arch.num_experts else "FFN columns"
    left_title = f"{arch.num_kv_heads} head groups" if width * heads >= 14 else f"{arch.num_kv_heads} groups"
    margin = max(_LABEL_CELLS, *(len(row.label) for row in drawn))
    title = f"{'':{margin}} {left_title + ' ':<{width * heads + _GAP}}{arch.ffn_dim:,} {units}"
    lines = [Text(title, style="dim")]
    for row in drawn:
        line = Text().append(f"{row.label:>{margin}} ", "dim")  # a style of the whole line would dim the cells
        line.append_text(marks.block(row.left, width if row.right else 1))
        if row.right:
            line.append(" " * _GAP).append_text(marks.block(row.right, 1))
        lines.append(line)
    return Group(*lines, _legend(placement, arch, topology, marks))


def _cell_width(num_cells: int) -> Literal[1, 2, 3]:
    return 3 if num_cells <= 8 else 2 if num_cells <= 16 else 1


class _Marks:
    """A letter and a colour for each device, a sign and stripes for each set of devices with copies."""

    def __init__(self, devices: Sequence[DeviceId], drawn: Sequence[Row]) -> None:
        self._index = {d: i for i, d in enumerate(devices)}
        sets = dict.fromkeys(c for row in drawn for c in (*row.left, *row.right) if len(c) > 1)
        self.copies = dict(zip(sets, cycle(_COPIES), strict=False))

    def sign(self, holders: Holders) -> str:
        """The character of a cell: who holds it."""
        return self.copies[holders] if len(holders) > 1 else _LETTERS[self._index[holders[0]] % len(_LETTERS)]

    def style(self, device: DeviceId) -> Style:
        """The rich style of a device: its colours."""
        text, ground = _COLOURS[self._index[device] % len(_COLOURS)]
        return Style(color=text, bgcolor=ground)

    def block(self, row: Sequence[Holders], width: int) -> Text:
        """Cells side by side; a copy's cells take the colours of its holders in turn."""
        block = Text()
        for i, holders in enumerate(row):
            block.append(self.sign(holders).center(width), self.style(holders[i % len(holders)]))
        return block


def _legend(placement: Placement, arch: ModelArch, topology: Topology, marks: _Marks) -> RenderableType:
    ffn_name = "experts" if arch.num_experts else "FFN"
    names = ("", "device", "tier", "heads", ffn_name, "vocabulary", "weights", "of model")
    table = columns_table(names, named=3)
    weights = weight_bytes(placement, arch)
    for device in topology.ids:
        if device not in weights:
            continue
        attention = sum(x.attention.count(device) for x in placement.layers)
        ffn = sum(x.ffn.count(device) for x in placement.layers)
        table.add_row(
            marks.block([(device,)], 3),
            device,
            topology.device(device).tier,
            share_text(attention, arch.num_layers * arch.num_kv_heads),
            share_text(ffn, arch.num_layers * arch.ffn_dim),
            share_text(placement.head.count(device), arch.vocab),
            bytes_text(weights[device]),
            share_text(weights[device], arch.model_bytes),
        )
    notes = [
        Text.assemble(" ", marks.block([holders] * 3, 1), f" a full copy on each of {', '.join(holders)}")
        for holders in marks.copies
    ]
    return Group(table, *notes)
