"""Tests of the Triton path: in Triton's interpreter, on CPU tensors, with TRITON_INTERPRET=1; else on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import triton_thresh as tt

from ..conftest import INTERPRETED

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    from ..interpreted.tools import fix_bf16, fix_minmax, run_faster

    fix_bf16()
    fix_minmax()
    run_faster()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*encountered in:RuntimeWarning:triton.runtime.interpreter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forced, with the block sizes of tables and defaults: a search would compile every candidate of every case."""
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    with tt.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch leaves uninitialised holds NaN, or 0xA5 bytes, so that an output nobody wrote shows."""
    from ..interpreted.tools import poison

    with poison():
        yield
