"""The pages of docs/: their code runs, what they name exists, and what they show is made from the registry and the results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from benchmarks import records
from docs import hooks, tables
from triton_thresh.registry import OPS

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")


class Port(NamedTuple):
    """One example of docs/porting.md."""

    title: str
    given: str
    before: str
    after: str


def ports() -> Iterator[Port]:
    block = r"```python\n(.*?)```\n+"
    pattern = rf"^##+ ([^\n]+)\n(?:(?!^##).)*?^Given:\n+{block}Before:\n+{block}After:\n+{block}"
    for match in re.finditer(pattern, (ROOT / "docs" / "porting.md").read_text(), re.DOTALL | re.MULTILINE):
        yield Port(*match.groups())


PORTS = list(ports())


def ran(given: str, code: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that code names, and the gradients of the leaves it was given, backward having run if it did not itself."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "F": F, "tt": tt}
    exec(given, names)
    leaves = {name: value for name, value in names.items() if isinstance(value, Tensor) and value.requires_grad}
    exec(code, names)
    if all(leaf.grad is None for leaf in leaves.values()):
        names["loss"].backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(leaves)
    return {name: value for name, value in names.items() if isinstance(value, Tensor)}, gradients


def test_every_block_of_the_page_is_part_of_an_example() -> None:
    assert len(PORTS) >= 9
    assert (ROOT / "docs" / "porting.md").read_text().count("```python") == 3 * len(PORTS)


@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.title)
def test_before_and_after(port: Port) -> None:
    """Every tensor that both name, and every gradient, is the same."""
    (before, gradients), (after, ported) = ran(port.given, port.before), ran(port.given, port.after)
    shared = before.keys() & after.keys()
    assert "loss" in shared
    for name in shared:
        torch.testing.assert_close(after[name], before[name], msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in gradients.items():
        assert gradient.count_nonzero() > 0, name
        torch.testing.assert_close(ported[name], gradient, msg=lambda text, name=name: f"{name}.grad: {text}")


@page
def test_pages_are_filled(page: Path) -> None:
    """Every directive names a section, a source or a table that exists."""
    text = page.read_text(encoding="utf-8")
    filled = hooks.filled(text)
    assert not hooks.DIRECTIVE.search(filled)
    assert text.count("<!-- ") == len(hooks.DIRECTIVE.findall(text)), "a directive that does not match"


@page
def test_links_lead_somewhere(page: Path) -> None:
    outside = {path.relative_to(ROOT).as_posix() for pattern in hooks.OUTSIDE for path in ROOT.glob(pattern)}
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", hooks.filled(page.read_text(encoding="utf-8"))):
        assert (ROOT / "docs" / target).is_file() or target in outside, target


def test_directives_that_name_nothing_are_errors() -> None:
    for call in (
        lambda: hooks.section("README.md", "No such heading"),
        lambda: hooks.source("triton_thresh/functional.py", "nothing"),
        lambda: hooks.filled("<!-- made: nothing -->"),
    ):
        with pytest.raises((ValueError, AttributeError), match=r"No such heading|nothing"):
            call()


def test_sections_end_where_they_should() -> None:
    section = hooks.section("README.md", "A fused loss in a training loop")
    assert section.startswith("```python")
    assert "confident predictions" in section, "a comment in a block of code is no heading"
    assert "\n## " not in section


def test_every_public_name_is_on_the_api_page() -> None:
    shown = set(re.findall(r"^::: triton_thresh\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    for name in tt.functional.__all__:
        assert f"functional.{name}" in shown
    for name in tt.nn.__all__:
        assert f"nn.{name}" in shown
    for name in tt.__all__:
        public = getattr(tt, name)
        if callable(public):
            assert f"{public.__module__.removeprefix('triton_thresh.')}.{name}" in shown


def test_the_map_names_files_that_exist() -> None:
    names = re.findall(r"[\w/]+\.py", (ROOT / "docs" / "architecture.svg").read_text())
    assert len(names) > 20
    for name in names:
        places = ("triton_thresh", "triton_thresh/families", "kernels", ".")
        assert any((ROOT / place / name).is_file() for place in places), name


def test_tables_hold_every_op() -> None:
    for made, left_out in ((tables.dtypes(), set()), (tables.bytes_moved(), {"threshold_loss"})):
        assert {name for name in OPS if f"`{name}`" not in made} == left_out
    gates = tables.gate_points() + tables.learned_points() + tables.loss_points()
    assert {name for name in OPS if f"`{name}(" not in gates} == {
        "threshold_loss",
        "threshold_grad",
        "threshold_gradients_",
    }


def test_tables_say_what_the_ops_do() -> None:
    """Three lines worked out by hand."""
    assert "| `hardshrink(x, 0.5)` | 0, 0 | 0, 0 | NaN, 1 | ∞, 1 | -∞, 1 |" in tables.gate_points()
    assert "| `step(x, 0.5, 0.25)` | 0, 0, -4 | 1, 0, -4 | 0, 0, -4 | 1, 0, 0 | 0, 0, 0 |" in tables.learned_points()
    assert "| number | bfloat16 | 4.125 | 4.125 | 0.125 |" in tables.bytes_moved()


def test_performance_is_what_result_files_hold() -> None:
    text = hooks.filled((ROOT / "docs" / "performance.md").read_text())
    gpus = [path for path in records.newest() if not records.read(path)[0].on_cpu]
    assert ("No speed on a GPU has been measured" in text) == (not gpus)
    for path in records.newest():
        record = records.read(path)[0]
        assert record.stamp.commit in text
        assert all(f"/{picture.name})" in text for picture in path.with_suffix("").glob("*.png"))


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == tt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", tt.__version__)
