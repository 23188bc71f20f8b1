"""Turns Triton's interpreter on, which must be before triton is imported: these tests run in a process of their own."""

import os
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton

if isinstance(triton.language.zeros, triton.JITFunction):
    raise pytest.UsageError(
        "triton was imported before its interpreter was turned on: run tests/interpreted in a pytest process of its own"
    )

from tests.interpreted.tools import fix_bf16, fix_minmax, poison, sentinel_view

fix_bf16()
fix_minmax()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch leaves uninitialised holds NaN, or 0xA5 bytes, so that an output nobody wrote shows."""
    with poison():
        yield


@pytest.fixture
def guarded() -> Iterator[Callable[..., torch.Tensor]]:
    """sentinel_view, with all the checks made when the test ends."""
    checks = []

    def guard(tensor: torch.Tensor, offset: int = 1) -> torch.Tensor:
        view, check = sentinel_view(tensor, offset)
        checks.append(check)
        return view

    yield guard
    for check in checks:
        check()
