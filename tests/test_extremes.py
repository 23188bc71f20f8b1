"""The tests of tests/kernels/test_extremes.py on the eager backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import triton_thresh as tt

from .kernels.test_extremes import *  # noqa: F403 - the tests are run here too


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield
