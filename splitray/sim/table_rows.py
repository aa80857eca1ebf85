"""Tables as text, a row a line: what is a comment, where columns end, and what is a number. Knows no columns.

Columns end at semicolons, else tabs, else commas, else spaces. A comma in a number is a decimal one where columns end
at something else, so that no value is ever read as two.
"""

import csv
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from splitray.user_file import UserFile

DECIMAL = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
"""A number with a decimal point, as a pattern."""
_GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}(?![0-9])")  # 1,234 is more or less than 2


class TableRow(NamedTuple):
    """The cells of one line, without the spaces around them."""

    file: UserFile
    line: int
    cells: list[str]
    separator: str

    def pointed(self, cell: str) -> str:
        """A cell that is a number, with a decimal point.

        Raises:
            InputError: its comma may mean something else.
        """
        if "," not in cell:
            return cell
        unclear = self.separator in " \t" and _GROUPED.match(cell)
        if self.separator == "," or "." in cell or cell.count(",") > 1 or unclear:
            expected, remedy = "a number with a decimal point", "write it without thousands separators"
            raise self.file.wrong(expected, repr(cell), line=self.line, remedy=remedy)
        return cell.replace(",", ".")


def reader_of(spec: str) -> tuple[str, str]:
    """The names of the reader and of the file in `READER:FILE`; no reader in `FILE`, which may have colons too."""
    name, colon, path = spec.partition(":")
    return (name, path) if colon and name.isidentifier() and not os.path.exists(spec) else ("", spec)


def table_rows(file: UserFile, *, headed: bool = False) -> Iterator[TableRow]:
    """The rows of a table; if it is `headed`, the first one tells where the columns of all end, else each its own.

    Lines that are empty or begin with #, // or ; are left out; behind a row with semicolons, one that begins with ; is
    a row. Without a header, what follows a # is left out, too.

    Raises:
        InputError: see `UserFile.lines`, or quotes do not end on their line.
    """
    separator, semicolons = "", False
    for line, text in file.lines():
        bare = (text if headed else text.partition("#")[0]).strip(" ")
        if not bare.strip() or bare.startswith(("#", "//")) or (bare[0] == ";" and not semicolons):
            continue
        ends_at = separator or separator_of(bare)
        semicolons = semicolons or ends_at == ";"
        separator = ends_at if headed else ""
        if ends_at == " ":
            cells = bare.split()
        else:
            cells = [c.strip() for c in (_quoted(file, line, bare, ends_at) if '"' in bare else bare.split(ends_at))]
        while cells and not cells[-1]:  # spreadsheets write columns, and rows, that nobody sees
            cells.pop()
        if cells:
            yield TableRow(file, line, cells, ends_at)


def separator_of(line: str) -> str:
    """What columns end at in a line."""
    for each in ";\t":
        if each in line:
            return each
    if "," not in line:
        return " "
    words = line.split()
    alone = any(w[0] == "," or w[-1] == "," for w in words)
    numbers = sum(w[0] in "+-.0123456789" for w in words)
    return "," if alone or numbers < 2 else " "


def _quoted(file: UserFile, line: int, text: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise file.wrong("quotes around whole cells", error, line=line, remedy="correct the row") from error
