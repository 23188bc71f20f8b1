"""Tests that only a GPU can run; tests/kernels runs the matrix of values on one too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_thresh as tt
from triton_thresh import tuning


@pytest.fixture(autouse=True)
def _triton_with_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(
        "TRITON_THRESH_AUTOTUNE", "0"
    )  # a search compiles every candidate: minutes over the whole matrix
    tuning.table.cache_clear()
    with tt.use_backend("triton"):
        yield
    tuning.table.cache_clear()
