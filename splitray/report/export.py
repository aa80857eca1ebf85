"""What a terminal shows, as files: plain text and SVG."""

import io
import re

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType

WIDTH = 80
# Rich's template loads a font from a public site; a picture must not need a network. (Doubled braces: a format.)
_LOCAL_SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def as_text(*shown: RenderableType) -> str:
    """Without colours, at most 80 columns wide, no blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(*shown, sep="\n")
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def as_svg(*shown: RenderableType, title: str) -> str:
    """What rich would print, as an SVG with colours."""
    console = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor")
    console.print(*shown, sep="\n")
    return console.export_svg(title=title, code_format=_LOCAL_SVG)
