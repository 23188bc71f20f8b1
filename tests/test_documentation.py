"""What the documents say is so: the README's tables, figures and examples, the docstrings, and CONTRIBUTING's diff."""

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
from docs import hooks, tables
from docs.readme import pages, updated
from triton_thresh import functional, gates, reference, registry
from triton_thresh.bases import BASES, Base
from triton_thresh.rules import RULES, Rule

from .conftest import INTERPRETED
from .rows import OPS
from .test_docs import assert_same, ran

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEVICE_FUNCTIONS = set(
    re.findall(r"^def (\w+)", (ROOT / "kernels" / "pointwise.py").read_text(encoding="utf-8"), re.MULTILINE)
)


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_readme_is_short_and_its_tables_are_new() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_made_from_the_registry_and_the_results(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert updated(page) == page, "run make table"


# What stands around the README's examples in a program.
SETUP = """
logits, y = torch.randn(64, 1, requires_grad=True), (torch.rand(64, 1) < 0.1).float()
x, noise = torch.randn(8, 3, 4, 4, requires_grad=True), torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1)
"""
AUTOENCODER = """
x = torch.randn(64, 16)
encoder, decoder = torch.nn.Linear(16, 512), torch.nn.Linear(512, 16)
activation = tt.nn.JumpReLU(512, threshold=0.1, bandwidth=0.1)
parameter = encoder.weight
"""


@pytest.mark.parametrize("example", _blocks("README.md", "python"))
def test_readme_examples_run_and_are_short(example: str) -> None:
    """Before and after are the same function; the autoencoder is another one, and only runs."""
    before, after = re.fullmatch(r"# before\n(.*?)\n# after[^\n]*\n(.*)", example, re.DOTALL).groups()  # type: ignore[union-attr]
    assert max(len(part.strip().splitlines()) for part in (before, after)) <= 10
    if "encoder(" in example:
        for code in (before, after):
            ran(AUTOENCODER, code)
        return
    needs = [line for line in SETUP.splitlines() if ("logits" in line) == ("logits" in example)]
    loss = "" if "loss" in example else "loss = y.square().sum()"
    assert_same("\n".join(needs), f"{before}\n{loss}", f"{after}\n{loss}")


def test_readme_says_what_is_so() -> None:
    """Its counted figure, the versions it needs, and the address of the repository."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    counted = [line for line in tables.counted() if line["dtype"] == "float32" and line["compiled_grad"]]
    losses = [
        line for line in counted if "." not in line["op"]
    ]  # those with a name, against the forms that people write
    eager, compiled = ([line[kind] / line["this"] for line in losses] for kind in ("eager", "compiled"))
    text = README.replace("\n", " ").replace("**", "")
    assert f"{int(min(eager))} to {int(max(eager))} times fewer bytes than in eager PyTorch" in text
    assert f"{min(compiled):.1f} times fewer than under `torch.compile`" in text
    assert all(line["compiled_grad"] <= line["this"] for line in losses), (
        "a loss compiled with its gradient moves as few"
    )
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (torch,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert f"Python {python} or newer and torch {torch} or newer" in README
    for found in re.findall(r"https://github.com/[\w-]+/triton_thresh", README):
        assert found == hooks.address()


def test_readme_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(targets) > 8
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("row", [*registry.GATES.values(), registry.KEEP_LARGE], ids=lambda row: str(row.name))
def test_every_gate_has_its_functions(row: registry.Gate) -> None:
    """On a CPU without Triton's interpreter a forgotten device function would not be missed."""
    device, host = [row.value or row.name], [row.name]
    if row.saves == "two bits":
        device.append(f"{row.name}_backward")
        host.append(f"{row.name}_backward")
    elif row.learns:
        device += [f"{row.name}_learned", f"{row.name}_learned_backward"]
    for name in device:
        assert name in DEVICE_FUNCTIONS, f"kernels/pointwise.py has no {name}, which the row {row.name} needs"
    for name in host:
        assert hasattr(reference, name), f"reference.py has no {name}, which the row {row.name} needs"
    names = gates.SIGNATURES[row.name]
    assert 1 <= row.operands <= len(names), (
        f"the row {row.name} has {row.operands} operands, its function takes {[*names]}"
    )
    assert 1 <= len(row.example) <= len(names), f"the example of the row {row.name} is not what its function takes"


@pytest.mark.parametrize("part", [*BASES, *RULES], ids=lambda part: str(part.__name__))
def test_every_base_and_rule_has_its_device_function(part: type[Base | Rule]) -> None:
    name = part.snake_name()
    assert name in DEVICE_FUNCTIONS, f"kernels/pointwise.py has no {name}, which {part.__name__} needs"


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_public_and_documented(name: str) -> None:
    assert hasattr(functional, name), f"functional.py has no {name}: CONTRIBUTING.md says how to make an op public"
    text = getattr(functional, name).__doc__ or ""
    for heading in ("Args:", "Shape:", "Raises:", "Equivalent to:", "Source:", "Examples:"):
        assert heading in text


@pytest.mark.parametrize("name", tt.nn.__all__)
def test_every_module_is_documented(name: str) -> None:
    text = getattr(tt.nn, name).__doc__ or ""
    for heading in ("Args:", "Equivalent to:", "Examples:"):
        assert heading in text
    assert "    Raises:" in text or "Shape, dtypes, errors and source are those of `functional." in text


@pytest.mark.parametrize("name", [n for n in tt.__all__ if callable(getattr(tt, n)) and n != "Operand"])
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
def test_contributing_adds_a_gate_a_base_and_a_rule(tmp_path: Path) -> None:
    """Nothing else is changed, in package or tests."""
    for name in ("kernels", "triton_thresh", "tests", "benchmarks", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for diff in _blocks("CONTRIBUTING.md", "diff"):
        subprocess.run(["git", "apply", "-C1", "--recount", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    names = "drop_above or absolute or ByTarget"
    files = [f"tests/kernels/test_{name}.py" for name in ("gates", "losses", "extremes", "traffic")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *files]
    command += ["-m", "not slow", "--assert=plain"]  # whose asserts need no words
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 50, run.stdout[-2000:]
