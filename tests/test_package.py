"""The ways to install and import the package, where nothing else of the project is: an unlisted file is missing only there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

import triton_thresh as tt

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PIP_ROOT_USER_ACTION": "ignore"}
OFFLINE = ("-q", "--no-deps", "--no-build-isolation")
# What a repository has and a source distribution does not need.
LEFT_OUT = {".gitignore", ".ci/run"}
# Kernels in Triton's interpreter against eager torch; then where the package's files are.
KERNELS = """
import json, sys
import torch
import triton_thresh as tt

def gradient(backend):
    x = torch.linspace(-1.0, 1.0, 12).requires_grad_()
    with tt.use_backend(backend):
        tt.threshold_mse_loss(tt.hardshrink(x, 0.5), torch.ones(12), 0.2).backward()
    return x.grad

torch.testing.assert_close(gradient("triton"), gradient("eager"))
print(json.dumps({name: m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "triton_thresh"}))
"""
# The examples of every module; what one compiles, make test compiles where it runs them in the clone.
EXAMPLES = """
import doctest, importlib, json, pkgutil
import torch
import triton_thresh as tt

torch.compiler.set_stance("force_eager")
names = [name for _, name, _ in pkgutil.walk_packages(tt.__path__, "triton_thresh.") if not name.endswith("__main__")]
modules = [tt, *map(importlib.import_module, names)]
done = [doctest.testmod(module) for module in modules]
failed, tried = sum(each.failed for each in done), sum(each.attempted for each in done)
print(json.dumps({"files": [m.__file__ for m in modules], "failed": failed, "tried": tried, "version": tt.__version__}))
"""

once = pytest.mark.skipif(INTERPRETED, reason="once is enough")
pytestmark = [pytest.mark.slow, once]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; fails with all it said."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON", "GIT_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**inherited, **QUIET, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Built(NamedTuple):
    """A repository of its own with the tracked files, and what was built of it."""

    source: Path
    sdist: Path
    wheel: Path


def wheel(what: str | Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", folder, what, cwd=folder.parent)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """With a data file in the package, and with what a build of an older state left behind."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in filter(None, run("git", "ls-files", "-z", cwd=ROOT).split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "triton_thresh" / "data.json").write_text("{}")
    run("git", "init", "-q", cwd=source)
    run("git", "add", ".", cwd=source)
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "All", cwd=source)
    for gone in ("build/lib/triton_thresh/gone.py", "build/lib/triton_thresh/kernels/gone.py"):
        (source / gone).parent.mkdir(parents=True, exist_ok=True)
        (source / gone).touch()
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})",
        cwd=source,
    )
    (sdist,) = folder.glob("*.tar.gz")
    return Built(source, sdist, wheel(source, folder / "wheel"))


@pytest.fixture(scope="module")
def environments(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Interpreters of new environments, which see where torch is but not the project, by what is installed in each."""
    outer = "\n".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    made = {}
    for name, what in {"wheel": (built.wheel,), "editable": ("-e", built.source), "nothing": ()}.items():
        folder = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(outer)
        made[name] = python = folder / "bin" / "python"
        if what:
            pip = (sys.executable, "-m", "pip", "--python", python)
            run(*pip, "install", *OFFLINE, "--ignore-installed", *what, cwd=folder)
    return made


def packaged(wheel: Path) -> dict[str, bytes]:
    archive = ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> Message:
    archive = ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_thresh").rglob("*.py")}
    expected -= {"triton_thresh/kernels.py"}
    expected |= {f"triton_thresh/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_thresh").rglob("*.json")}
    assert packaged(built.wheel).keys() == expected | {"triton_thresh/py.typed", "triton_thresh/data.json"}
    assert any(name.endswith("LICENSE") for name in ZipFile(built.wheel).namelist())


def test_metadata(built: Built) -> None:
    """Extras are for what is in the wheel; the groups of pyproject.toml are for the repository."""
    said = metadata(built.wheel)
    assert said["Version"] == tt.__version__
    assert {"demo", "bench", "notebooks", "test", "docs", "dev"}.isdisjoint(said.get_all("Provides-Extra", []))
    assert "Repository" in dict(url.split(", ") for url in said.get_all("Project-URL"))


def test_what_was_tried_is_allowed(built: Built) -> None:
    """make versions found no failure, and the metadata names the Pythons that it tried."""
    rows = json.loads((ROOT / "tests" / "versions.json").read_text())
    named = metadata(built.wheel).get_all("Classifier")
    for row in rows:
        assert not row["failed"]
        assert f"Programming Language :: Python :: {'.'.join(row['python'].split('.')[:2])}" in named


def test_every_import_is_a_dependency(built: Built) -> None:
    required = {re.split(r"[^\w-]", name)[0] for name in metadata(built.wheel).get_all("Requires-Dist")}
    assert required >= {"torch", "triton"}
    given = required | sys.stdlib_module_names | {"triton_thresh", "typing_extensions"}  # torch needs the latter too
    for name, text in packaged(built.wheel).items():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= given, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in given, name


def test_one_address(built: Built) -> None:
    """Whatever page or file names the repository names the one that the metadata does."""
    urls = dict(url.split(", ") for url in metadata(built.wheel).get_all("Project-URL"))
    for name in run("git", "ls-files", "*.md", "*.yml", "*.toml", "*.ipynb", cwd=built.source).splitlines():
        text = (built.source / name).read_text(encoding="utf-8")
        for url in re.findall(r"https://[\w.]+/[\w.-]+/triton[-_]thresh\b", text):
            assert url == urls["Repository"], name


def test_no_file_is_a_link() -> None:
    """GitHub's zip and Windows break symbolic links."""
    assert not [line for line in run("git", "ls-files", "-s", cwd=ROOT).splitlines() if line.startswith("120000")]


def test_the_source_distribution_is_whole(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(run("git", "ls-files", cwd=built.source).splitlines()) - names == LEFT_OUT


@pytest.mark.parametrize("way", ["sdist", "git", "zip"])
def test_others_give_the_same_wheel(built: Built, way: str, tmp_path: Path) -> None:
    """pip builds this wheel and installs it."""
    what: str | Path = built.sdist
    if way == "git":
        what = f"git+{built.source.as_uri()}"
    elif way == "zip":  # with a folder around all files, as hosts of repositories make it
        what = tmp_path / "tree.zip"
        run("git", "archive", "--prefix=triton_thresh-main/", "-o", what, "HEAD", cwd=built.source)
    assert packaged(wheel(what, tmp_path / "wheel")) == packaged(built.wheel)


@pytest.mark.parametrize(
    ("installed", "in_clone"), [("wheel", False), ("wheel", True), ("editable", False), ("nothing", True)]
)
def test_kernels_are_found(
    built: Built, environments: dict[str, Path], installed: str, in_clone: bool, tmp_path: Path
) -> None:
    """They are those of the package that was imported: in a clone its own, also where a wheel is installed."""
    pytest.importorskip("triton", reason="kernels need Triton")
    python = environments[installed]
    cwd = built.source if in_clone else tmp_path
    files = json.loads(run(python, "-c", KERNELS, cwd=cwd, TRITON_INTERPRET="1"))
    assert files.keys() >= {"triton_thresh.kernels.pointwise", "triton_thresh.kernels.loss"}
    home = python.parents[1] if (installed, in_clone) == ("wheel", False) else built.source
    assert all(Path(file).is_relative_to(home) for file in files.values()), files


def test_every_example_runs_from_a_wheel(environments: dict[str, Path], tmp_path: Path) -> None:
    """Every module is imported, and every public function called; the command is on the path."""
    pytest.importorskip("triton", reason="modules of kernels need Triton")
    python = environments["wheel"]
    home = python.parents[1]
    found = json.loads(run(python, "-c", EXAMPLES, cwd=tmp_path))
    assert all(Path(file).is_relative_to(home) for file in found["files"]), found["files"]
    assert (found["failed"], found["version"]) == (0, tt.__version__)
    assert found["tried"] > 60
    assert python.with_name("triton-thresh").is_file()


@pytest.mark.parametrize("installed", ["wheel", "editable"])
def test_types(environments: dict[str, Path], installed: str, tmp_path: Path) -> None:
    """pyright, strict, finds the package and its types, and reports the mistakes that the file marks."""
    pytest.importorskip("pyright", reason="pyright is not installed")
    usage = tmp_path / "usage.py"
    usage.write_bytes((ROOT / "tests" / "typing" / "usage.py").read_bytes())
    run(sys.executable, "-m", "pyright", "--pythonpath", environments[installed], usage, cwd=tmp_path)


def test_completion_shows_what_is_public() -> None:
    assert dir(tt) == sorted(tt.__all__)
    assert {"functional", "nn", "ops", "hardshrink", "ByPrediction", "Operand"} <= set(dir(tt))
    for module in (tt.functional, tt.nn):
        assert dir(module) == sorted(module.__all__)
