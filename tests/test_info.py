"""``python -m triton_thresh info``: versions, devices, tables, and what would run, whatever is installed."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

import triton_thresh as tt
from triton_thresh import backend, tuning
from triton_thresh.__main__ import main

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")


def info(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["info"]) == 0
    return capsys.readouterr().out.splitlines()


def test_versions_place_and_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    with tt.use_backend("eager"):
        said = info(capsys)
    assert said[0] == f"triton_thresh {tt.__version__} in {Path(tt.__file__).parent}"
    assert said[1] == f"Python {platform.python_version()}, torch {torch.__version__}"
    assert said[2].startswith("triton ")
    assert said[3] == "backend asked for: eager"
    assert said[4] == f"block sizes found by searches: {tmp_path}; a search may run: no"
    assert said[5] == "cpu: eager (asked for)"


@pytest.mark.parametrize("has", [True, False], ids=["triton", "no triton"])
def test_gpus_and_their_tables(
    has: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = {f"hardshrink/float32/{size}": [256, 2] for size in range(3)}
    (tmp_path / "Made_up_GPU.json").write_text(json.dumps(table))
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Made-up GPU{' 2' * device.index}")
    monkeypatch.setattr(backend, "has_triton", lambda: has)
    tuning.table.cache_clear()
    with tt.use_backend("auto"):
        said = info(capsys)
    tuning.table.cache_clear()
    would = "triton (auto: tensors on cuda run on Triton)" if has else "eager (auto: Triton is not installed)"
    assert f"cuda:0 Made-up GPU, 3 block sizes found: {would}" in said
    assert f"cuda:1 Made-up GPU 2, 0 block sizes found: {would}" in said


def test_triton_asked_for_where_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    with tt.use_backend("triton"):
        said = info(capsys)
    (line,) = (line for line in said if line.startswith("cpu: "))
    assert "nothing runs" in line
    assert ("TRITON_INTERPRET=1" if backend.has_triton() else "not installed") in line
