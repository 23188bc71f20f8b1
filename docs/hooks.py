"""Makes parts of the pages when they are built: sections of the README, tables, source; and the files from outside of docs/.

A line ``<!-- section: FILE, HEADING -->`` or ``<!-- made: NAME -->`` of a page is replaced, a line that is but the link
[`NAME` in `FILE`](...) becomes that source, and a table between ``<!-- begin: NAME -->`` and ``<!-- end -->`` is made anew.
``<!-- check: ... -->`` is code that the tests run after the block above it; readers do not see it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import tables

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^<!-- (section|made): (.+) -->$", re.MULTILINE)
TABLE = re.compile(r"^<!-- begin: (\w+) -->\n.*?<!-- end -->$", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(r"^\[`(\w+)` in `([\w/.]+)`\]\(.+\)$", re.MULTILINE)
CHECK = re.compile(r"^<!-- check:.*?-->\n", re.MULTILINE | re.DOTALL)
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "notebooks/*.ipynb",
)


def section(file: str, heading: str) -> str:
    """The text under a heading, up to the next of its level or above. Links into docs/ are those of a page of docs/."""
    found: list[str] = []
    level, fenced = 0, False
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        match = None if fenced else re.match(r"(#+) (.+)", line)
        if match and level:
            break
        if match and match[2] == heading:
            level = len(match[1])
        elif level and not line.startswith("<!-- "):
            found.append(line)
    if not level:
        raise ValueError(f"{file} has no heading {heading!r}")
    return "\n".join(found).strip().replace("](docs/", "](").replace("](notebooks)", "](tutorials.md)")


def source(file: str, name: str) -> str:
    """A function or class without its docstring, or an entry of the registry."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            lines = text.splitlines()
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            kept = lines[first - 1 : node.end_lineno]
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                assert docstring.end_lineno is not None
                kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
            return "\n".join([f'```python title="{file}"', *kept, "```"])
        entry = isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        if entry and node.args[0].value == name:  # type: ignore[attr-defined]
            found = ast.get_source_segment(text, node, padded=True)
            return f'```python title="{file}"\n{found}\n```'
    raise ValueError(f"{file} has no {name!r}")


def filled(page: str) -> str:
    """A page with its directives replaced, and without what only the tests run."""

    def made(match: re.Match[str]) -> str:
        kind, argument = match[1], match[2]
        if kind == "made":
            return str(getattr(tables, argument)())
        return section(*argument.split(", ", 1))

    page = TABLE.sub(lambda match: str(getattr(tables, match[1])()), CHECK.sub("", page))
    return SOURCE.sub(lambda match: source(match[2], match[1]), DIRECTIVE.sub(made, page))


def address() -> str | None:
    """Where the repository is, by pyproject.toml."""
    found = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The notebooks join the tutorials, and the address of the repository is the package's."""
    for entry in config.nav or []:
        if "Tutorials" in entry:
            entry["Tutorials"] += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb"))
    config.repo_url = address()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Results, with the links that the README has, the notebooks, and the pages of the repository's root."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


on_files.mkdocs_priority = 100  # type: ignore[attr-defined] # before the plugin that renders notebooks


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces a page's directives."""
    return filled(markdown)
