"""The list of files in each folder's README.md: the words are the first paragraph of each module's docstring.

`python tests/packaging/file_lists.py` rewrites the lists (`make format` does it too). The order of the rows is the
README's own, since a reader wants the ground floor first; new files come last and files that are gone go.
`test_file_lists.py` compares.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("splitray", "actors", "serve_apps", "rllib_configs")
PLAIN_FOLDERS = ("examples",)  # programs, no package
HEADER = "| file | what it is |\n|---|---|\n"
TABLE = re.compile(re.escape(HEADER) + r"((?:\|.*\n)*)")
NAME = re.compile(r"\| `([\w./]+)` \|")


def folders() -> list[Path]:
    """Every folder with Python files of its own, the packages' rooms first to last."""
    rooms = [init.parent for package in PACKAGES for init in sorted((ROOT / package).rglob("__init__.py"))]
    return rooms + [ROOT / name for name in PLAIN_FOLDERS]


def opening(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def wanted(folder: Path) -> dict[str, str]:
    """What the list of a folder has to say: its files, and the rooms inside it, each with its sentence."""
    rows = {path.name: opening(path) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}
    rooms = {f"{init.parent.name}/": opening(init) for init in sorted(folder.glob("*/__init__.py"))}
    return rooms | rows


def rows_of(text: str) -> list[tuple[str, str]]:
    """The rows of the list in a README: name and sentence; nothing where there is no list."""
    table = TABLE.search(text)
    rows = table.group(1).splitlines() if table else []
    return [(named.group(1), row.split("|", 2)[2].rstrip(" |").strip()) for row in rows if (named := NAME.match(row))]


def rewritten(text: str, entries: dict[str, str]) -> str:
    """A README with its list brought up to date, in the order that it had."""
    had = [name for name, _ in rows_of(text) if name in entries]
    order = list(dict.fromkeys([*had, *entries]))
    table = HEADER + "".join(f"| `{name}` | {entries[name]} |\n" for name in order)
    if TABLE.search(text):
        return TABLE.sub(lambda _: table, text, count=1)
    return f"{text.rstrip()}\n\n{table}"


def main() -> None:
    """Rewrite what differs and say which."""
    for folder in folders():
        readme = folder / "README.md"
        old = readme.read_text(encoding="utf-8") if readme.exists() else f"# {folder.relative_to(ROOT)}\n"
        new = rewritten(old, wanted(folder))
        if new != old:
            readme.write_text(new, encoding="utf-8")
            print(readme.relative_to(ROOT))


if __name__ == "__main__":
    main()
