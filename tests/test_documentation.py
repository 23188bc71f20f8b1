"""What the documents say is so: the op table is the registry's, the README's example runs, CONTRIBUTING's diff adds an op."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import triton_thresh as tt
from triton_thresh import functional
from triton_thresh.registry import OPS
from triton_thresh.table import updated

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_readme_table_is_the_registrys() -> None:
    readme = (ROOT / "README.md").read_text()
    assert updated(readme) == readme, "run make table"


@pytest.mark.parametrize("example", _blocks("README.md", "python"))
def test_readme_example_runs(example: str) -> None:
    exec(example, {})


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_public_and_documented(name: str) -> None:
    text = getattr(functional, name).__doc__ or ""
    for heading in ("Args:", "Shape:", "Raises:", "Equivalent to:", "Source:", "Examples:"):
        assert heading in text


@pytest.mark.parametrize("name", tt.nn.__all__)
def test_every_module_is_documented(name: str) -> None:
    text = getattr(tt.nn, name).__doc__ or ""
    for heading in ("Args:", "Equivalent to:", "Examples:"):
        assert heading in text
    assert "    Raises:" in text or "Shape, dtypes, errors and source are those of `functional." in text


@pytest.mark.parametrize("name", [name for name in tt.__all__ if callable(getattr(tt, name))])
def test_every_public_name_is_explained(name: str) -> None:
    """Every argument is described, and every example is one that the doctests run."""
    public = getattr(tt, name)
    text = inspect.getdoc(public) or ""
    assert text.split("\n")[0].endswith((".", ":"))
    if public is tt.Explanation:
        assert all(f"\n    {field}: " in text for field in public.__dataclass_fields__)
        return
    assert ">>> " in text
    for parameter in inspect.signature(public).parameters.values():
        shown = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        assert f"\n    {shown}: " in text, shown


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts interpreting processes of its own")
def test_contributing_adds_an_op(tmp_path: Path) -> None:
    for name in ("kernels", "triton_thresh", "tests", "benchmarks", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (diff,) = _blocks("CONTRIBUTING.md", "diff")
    subprocess.run(["git", "apply", "-C1", "--recount", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "drop_above", "tests/kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 50, run.stdout[-2000:]
