"""Writes the README's tables anew, by ``python -m docs.readme``.

A table stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``; NAME is a function of docs/tables.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from docs import tables

README = Path(__file__).parents[1] / "README.md"
MADE = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(readme: str) -> str:
    """A README with its tables made anew by the functions of docs/tables.py."""
    return MADE.sub(lambda found: f"{found[1]}{getattr(tables, found[2])()}\n{found[3]}", readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
