"""Writes the tables of the README and of the pages anew, by ``python -m docs.readme``.

A table stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``; NAME is a function of docs/tables.py. It is committed,
because pages are also read without the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from docs import tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MADE = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Where such tables are."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if MADE.search(path.read_text(encoding="utf-8"))]


def updated(page: str) -> str:
    """A page with its tables made anew by the functions of docs/tables.py."""
    return MADE.sub(lambda found: f"{found[1]}{getattr(tables, found[2])()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
