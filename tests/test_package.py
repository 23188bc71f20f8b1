"""The built wheel: an unlisted subpackage or data file is missing only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from .conftest import INTERPRETED

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, torch, triton_thresh as tt
assert tt.__file__.startswith(sys.argv[1]), tt.__file__
x = torch.tensor([-1.0, 0.2, 0.9], requires_grad=True)
tt.threshold_mse_loss(tt.hardshrink(x), torch.zeros(3), 0.5).backward()
assert torch.allclose(x.grad, torch.tensor([-2 / 3 * 0.1, 0.0, 2 / 3 * 0.9]))
import triton_thresh.kernels.gate
assert triton_thresh.kernels.__file__.startswith(sys.argv[1])
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="once is enough")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    assert {"triton_thresh/py.typed", "triton_thresh/kernels/pointwise.py", "triton_thresh/demo/tasks.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"triton_thresh"}


def test_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "site")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
