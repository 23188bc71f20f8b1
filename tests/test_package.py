"""The built distributions, each installed where nothing else of the project is: an unlisted file is missing only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

from triton_thresh import __version__, measured

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]
GPU = "Made-up GPU"
TABLE = {"hardshrink/float32/10": measured.Config(256, 2)}
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
OFFLINE = ("-q", "--no-deps", "--no-build-isolation")
# Forward and backward of every op and every cell of the grid, and every file of the package.
PROGRAM = """
import importlib, json, pkgutil, sys
import torch
import triton_thresh as tt
from triton_thresh.families import ForeachGate, Gate, GradientGate, LearnedGate, Loss

x = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
y, p = (x > 0).float(), x.sigmoid()
found = {}

def record(name, *outputs, leaf=None):
    found[name] = [output.tolist() for output in outputs]
    if leaf is not None:
        sum(output.sum() for output in outputs).backward()
        found[name].append(leaf.grad.tolist())

for name, op in tt.ops().items():
    leaf = x.clone().requires_grad_()
    if isinstance(op, Gate):
        record(name, op(leaf, *op.example), leaf=leaf if op.differentiable else None)
    elif isinstance(op, LearnedGate):
        outputs = op(leaf, torch.full((4,), 0.5), 0.25)
        record(name, *(outputs if isinstance(outputs, tuple) else (outputs,)), leaf=leaf)
    elif isinstance(op, GradientGate):
        record(name, op(leaf, 0.5) * x, leaf=leaf)
    elif isinstance(op, ForeachGate):
        leaf.grad = x.clone()
        op([leaf], 0.5)
        record(name, leaf.grad)
    else:
        assert isinstance(op, Loss)
        for base, rule in op.cells:
            leaf = (p if base == "bce" else x).clone().requires_grad_()
            settings = () if rule is tt.ByLoss else (0.5,)
            named = {} if op.rule else {"base": base}
            record(f"{name} {base} {rule.__name__}", op(leaf, y, rule(*settings), **named), leaf=leaf)
for _, name, _ in pkgutil.walk_packages(tt.__path__, "triton_thresh."):
    if not name.endswith("__main__") and (tt.backend.has_triton() or "kernels" not in name and "launch" not in name):
        importlib.import_module(name)
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "triton_thresh"]
print(json.dumps({"found": found, "files": files, "version": tt.__version__, "path": sys.path}))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="once is enough")]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; fails with all it said."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**inherited, **QUIET, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Built(NamedTuple):
    """The distributions, and the wheel that the source distribution gives."""

    wheel: Path
    sdist: Path
    again: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Of the tracked files, and a made-up table of block sizes."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in filter(None, run("git", "ls-files", "-z", cwd=ROOT).split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    table = source / "triton_thresh" / "tuned" / f"{measured.slug(GPU)}.json"
    table.write_text(json.dumps(measured.document(GPU, measured.Table(TABLE, {}))))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    for name, what in (("wheel", source), ("again", sdist)):
        run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", folder / name, what, cwd=folder)
    return Built(next((folder / "wheel").iterdir()), sdist, next((folder / "again").iterdir()))


def installed(what: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the distribution in it, which sees where torch is but not the project."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(outer))
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "--ignore-installed", what, cwd=folder)
    return python


def packaged(wheel: Path) -> set[str]:
    return {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_thresh").rglob("*.py")}
    expected |= {f"triton_thresh/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"triton_thresh/py.typed", f"triton_thresh/tuned/{measured.slug(GPU)}.json"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_thresh" / "tuned").glob("*.json")}
    assert packaged(built.wheel) == expected
    assert "kernels" not in {name.split("/")[0] for name in packaged(built.wheel)}
    (metadata,) = (name for name in ZipFile(built.wheel).namelist() if name.endswith(".dist-info/METADATA"))
    text = ZipFile(built.wheel).read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in text
    assert "\nRequires-Dist: torch>=" in text
    assert any(name.endswith("LICENSE") for name in ZipFile(built.wheel).namelist())


def test_the_source_distribution_is_whole(built: Built) -> None:
    """It gives the same wheel, and holds what it takes to test, document and measure."""
    assert packaged(built.again) == packaged(built.wheel)
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "mkdocs.yml"}
    needed |= {"tests/conftest.py", "benchmarks/run.py", "docs/api.md", "docs/architecture.svg", "kernels/gate.py"}
    assert needed <= names


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_every_op_runs_from_an_empty_environment(built: Built, kind: str, tmp_path: Path) -> None:
    """From a folder outside of the repository: the same values and gradients as here, in files of that environment."""
    python = installed(getattr(built, kind), tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = json.loads(run(python, "-c", PROGRAM, cwd=elsewhere))
    here = json.loads(run(sys.executable, "-c", PROGRAM, cwd=ROOT, PYTHONPATH=str(ROOT)))
    assert len(there["files"]) > 40
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in there["files"]), there["files"]
    assert not any(Path(file).is_relative_to(tmp_path) for file in here["files"])
    assert there["found"] == here["found"]
    assert there["version"] == __version__
    said = run(python, "-m", "triton_thresh", "info", cwd=elsewhere)
    assert f"triton_thresh {__version__} in {tmp_path / 'venv'}" in said
    assert f"block sizes shipped for: {GPU}" in said
    shown = f"from triton_thresh import measured; print(measured.shipped({GPU!r}).entries)"
    assert run(python, "-c", shown, cwd=elsewhere).strip() == str(TABLE)
