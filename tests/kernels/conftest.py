"""Tests of the Triton path. With TRITON_INTERPRET=1 they run here, on CPU tensors in Triton's interpreter; else they need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import triton_thresh as tt

from ..conftest import INTERPRETED

HERE = Path(__file__).parent


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
def triton_backend() -> Iterator[None]:
    with tt.use_backend("triton"):
        yield
