"""The pages of docs/: their code runs, what they name exists, and what they show is made from the registry and the results."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import triton_thresh as tt
from benchmarks import records
from docs import hooks, pictures, tables

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")


# ----------------------------------------------------------------------------------------------------------------- code

# A block of Python, what it prints if that is shown below it, and what is checked after it.
BLOCK = re.compile(
    r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?(?:\n+<!-- check:\n(.*?)-->$)?", re.DOTALL | re.MULTILINE
)
PROGRAMS = [path for path in PAGES if path.name != "porting.md" and BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_pages_are_programs(path: Path) -> None:
    """The blocks of a page run in order, print what stands below them, and what is checked after them holds."""
    names: dict[str, Any] = {}
    for code, printed, check in BLOCK.findall(path.read_text(encoding="utf-8")):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, names)
        assert said.getvalue() == printed
        exec(check, names)


def test_most_pages_have_code_and_most_code_is_checked() -> None:
    assert len(PROGRAMS) >= 8
    for path in PROGRAMS:
        blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
        checked = sum(bool(printed or check) for _, printed, check in blocks)
        assert 2 * checked >= len(blocks), path.stem
        assert len(re.findall(r"^```python$", path.read_text(encoding="utf-8"), re.MULTILINE)) == len(blocks)


@page
def test_code_fits_the_page(page: Path) -> None:
    for code, *_ in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert max(map(len, code.splitlines())) <= 100


class Port(NamedTuple):
    """One example of docs/porting.md."""

    title: str
    given: str
    before: str
    after: str


def ports() -> Iterator[Port]:
    block = r"```python\n(.*?)```\n+"
    pattern = rf"^##+ ([^\n]+)\n(?:(?!^##).)*?^Given:\n+{block}Before:\n+{block}After:\n+{block}"
    for match in re.finditer(pattern, (DOCS / "porting.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
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


def assert_same(given: str, before: str, after: str) -> None:
    """Every tensor that both name, and every gradient, is the same."""
    (left, gradients), (right, ported) = ran(given, before), ran(given, after)
    shared = left.keys() & right.keys()
    assert "loss" in shared
    for name in shared:
        torch.testing.assert_close(right[name], left[name], msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in gradients.items():
        assert gradient.count_nonzero() > 0, name
        torch.testing.assert_close(ported[name], gradient, msg=lambda text, name=name: f"{name}.grad: {text}")


def test_every_block_of_the_page_is_part_of_an_example() -> None:
    assert len(PORTS) >= 9
    assert (DOCS / "porting.md").read_text(encoding="utf-8").count("```python") == 3 * len(PORTS)


@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.title)
def test_before_and_after(port: Port) -> None:
    assert_same(port.given, port.before, port.after)


# ------------------------------------------------------------------------------------------------------- links and names


@page
def test_pages_are_filled(page: Path) -> None:
    """Every directive names a section, a source or a table that exists."""
    text = page.read_text(encoding="utf-8")
    filled = hooks.filled(text)
    assert not hooks.DIRECTIVE.search(filled)
    known = len(hooks.DIRECTIVE.findall(text)) + len(hooks.CHECK.findall(text)) + 2 * len(hooks.TABLE.findall(text))
    assert text.count("<!-- ") == known, "a directive that does not match"
    assert "<!-- " not in filled


@page
def test_links_lead_somewhere(page: Path) -> None:
    outside = {path.relative_to(ROOT).as_posix() for pattern in hooks.OUTSIDE for path in ROOT.glob(pattern)}
    text = re.sub(r"^```.*?^```$", "", hooks.filled(page.read_text(encoding="utf-8")), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        path = (page.parent / target).resolve()
        assert path.is_file() or path.relative_to(DOCS).as_posix() in outside, target


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert set(named) == pages | {"CONTRIBUTING.md", "CHANGELOG.md"}
    assert len(named) == len(set(named))


def test_formulas_of_notebooks_are_drawn() -> None:
    """mkdocs-jupyter loads no MathJax of its own."""
    assert "custom_mathjax_url: https://" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_directives_that_name_nothing_are_errors() -> None:
    for call in (
        lambda: hooks.section("README.md", "No such heading"),
        lambda: hooks.source("triton_thresh/functional.py", "nothing"),
        lambda: hooks.filled("<!-- made: nothing -->"),
    ):
        with pytest.raises((ValueError, AttributeError), match=r"No such heading|nothing"):
            call()


def test_sections_end_where_they_should() -> None:
    section = hooks.section("README.md", "Before and after")
    assert "# before" in section, "a comment in a block of code is no heading"
    assert "\n## " not in section
    assert "](docs/" not in section


def test_every_public_name_has_a_place_in_the_reference() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: triton_thresh\.([\w.]+)$", text, re.MULTILINE)
    modules = {f"nn.{name}" for name in tt.nn.__all__}
    public = {name for name in tt.__all__ if callable(getattr(tt, name))}
    assert {*shown} == modules | public | {"Operand"}
    assert len(shown) == len({*shown})


def test_the_map_names_files_that_exist() -> None:
    names = re.findall(r"[\w/]+\.py", (DOCS / "architecture.svg").read_text(encoding="utf-8"))
    assert len(names) > 20
    for name in names:
        places = ("triton_thresh", "kernels", ".")
        assert any((ROOT / place / name).is_file() for place in places), name


# --------------------------------------------------------------------------------------------------------------- tables


def test_tables_hold_every_op() -> None:
    for made in (tables.glance(), tables.formulas()):
        assert {name for name in tt.ops() if f"`{name}`" not in made} == set()


def test_pipes_of_formulas_do_not_end_cells() -> None:
    for line in tables.formulas().splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) in (0, 4), line


def test_tables_say_what_the_ops_do() -> None:
    """Lines worked out by hand: -log(0.88) is 0.128, -log(0.12) is 2.12."""
    assert "| `hardshrink(x, 0.5)` | 0, 0 | 0, 0 | NaN, 1 | ∞, 1 | -∞, 1 |" in tables.gate_points()
    assert "| `step(x, 0.5, 0.25)` | 0, 0, -4 | 1, 0, -4 | 0, 0, -4 | 1, 0, 0 | 0, 0, 0 |" in tables.learned_points()
    assert "| `threshold_mse_loss(x, 1, 0.5)` | 0.25, 1 | NaN, NaN | ∞, ∞ | ∞, -∞ |" in tables.loss_points()
    assert "| plain BCE | 0.13 | 2.1 | 2.1 | 0.13 |" in tables.costs()
    assert "| a missed positive ten times, as above | 0.13 | 2.1 | 21 | 0.13 |" in tables.costs()
    assert "| `ByOutcome(0.5, 1.0, 2.0, 10.0, 1.0)` | 0.13 | 4.2 | 21 | 0.13 |" in tables.rule_costs()


def test_performance_is_what_result_files_hold() -> None:
    text = hooks.filled((DOCS / "performance.md").read_text(encoding="utf-8"))
    gpus = [path for path in records.newest() if not records.read(path)[0].on_cpu]
    assert ("No speed on a GPU has been measured" in text) == (not gpus)
    for path in records.newest():
        assert records.read(path)[0].stamp.commit in text
        assert all(f"/{picture.name})" in text for picture in path.with_suffix("").glob("*.png"))


def test_bytes_say_how_many_times_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"op": "an_op", "dtype": "float32", "eager": 60.0, "compiled": 20.0, "compiled_grad": None, "this": 12.0}
    monkeypatch.setattr(tables, "counted", lambda: [line, {**line, "dtype": "bfloat16", "eager": 24.0, "this": 6.0}])
    assert "| `an_op` | 60 | 20 | – | 12 | 5 | 4 |" in tables.bytes_of_a_step()


def test_only_step_and_float16_losses_move_fewer_bytes_when_compiled() -> None:
    """As the page says. float16 losses compute their gradient in backward."""
    behind = set()
    for line in tables.counted():
        behind |= {line["op"]} if line["compiled"] and line["compiled"] < line["this"] else set()
        if line["compiled_grad"]:
            assert (line["compiled_grad"] < line["this"]) == (line["dtype"] == "float16"), line
            assert line["compiled_grad"] <= line["this"]
    assert behind == {"step"}


def test_hardware_claims_nothing_that_was_not_done() -> None:
    compiled = {line["target"] for path in (records.RESULTS / "compile").rglob("*.jsonl") for line in _lines(path)}
    if others := tables.loaded("targets.json"):
        compiled |= {*others}
    for line in tables.hardware().splitlines()[2:-1]:
        name, target, made, executed, ran, measured = (cell.strip() for cell in line.strip("|").split("|"))
        assert (made != "no") == (target.strip("`") in compiled), name
        assert (ran == executed == "no") or measured != "no"
    assert compiled <= set(tables.HARDWARE.values())


@pytest.mark.parametrize(
    ("device", "target"),
    [
        ("NVIDIA H200", "sm_90"),
        ("NVIDIA H100 80GB HBM3", "sm_90"),
        ("NVIDIA A100-SXM4-80GB", "sm_80"),
        ("NVIDIA A10", "sm_86"),
        ("NVIDIA GeForce RTX 3090", "sm_86"),
        ("NVIDIA L40S", "sm_89"),
        ("NVIDIA GeForce RTX 5090", "sm_120"),
        ("Tesla T4", "sm_75"),
        ("NVIDIA GeForce RTX 2080 Ti", "sm_75"),
        ("AMD Instinct MI300X", "gfx942"),
        ("NVIDIA RTX 2000 Ada Generation", None),
    ],
)
def test_a_device_stands_in_its_own_row_alone(device: str, target: str | None) -> None:
    rows = [made for names, made in tables.HARDWARE.items() if tables._is_one_of(device, names)]
    assert rows == ([target] if target else [])


def test_versions_are_those_that_were_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "not been run" in tables.versions()
    row = {
        "python": "3.10.1",
        "torch": "2.11.0",
        "triton": None,
        "platform": "Linux x86_64",
        "passed": 411,
        "failed": ["a"],
    }
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "versions.json").write_text(json.dumps([row]), encoding="utf-8")
    assert "| 3.10.1 | 2.11.0 | – | Linux x86_64 | 411 | 1 |" in tables.versions()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", pictures.SOURCES, ids=lambda path: path.stem)
def test_pictures_are_drawn_from_the_committed_results(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.text["Source"] == pictures.digest(path), "run python -m docs.pictures"


def test_jumprelu_needs_fewer_features() -> None:
    """The claim below the picture: at any R² that both reach, on the line between its points."""
    found = tables.loaded("features.json")
    curves = {}
    for name in ("JumpReLU + L0", "ReLU + L1"):
        assert all(len(line["r2"]) == len(line["features"]) == 10 for line in found[name])
        points = sorted((np.mean(line["r2"]), np.mean(line["features"])) for line in found[name])
        curves[name] = np.array(points).T
    jump, relu = curves["JumpReLU + L0"], curves["ReLU + L1"]
    within = [(r2, count) for r2, count in jump.T if relu[0].min() <= r2 <= relu[0].max()]
    assert len(within) >= 3
    for r2, count in within:
        assert count < np.interp(r2, *relu)


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == tt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", tt.__version__)
