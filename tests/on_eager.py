"""Fixtures with which tests of kernels run in eager torch: import them beside the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import triton_thresh as tt


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield
