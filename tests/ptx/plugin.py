"""Runs the tests of tests/kernels, and the accuracy tests of tests/gpu, on CPU tensors by compiled PTX: see `make ptx`.

    python -m pytest -p tests.ptx.plugin tests/kernels

PTX_ARCH is 80, 90 (default) or 100; PTX_APPROXIMATE is exact (default), random, plus or minus; PTX_SMALL=1 takes small blocks;
PTX_EVERY=n runs each n-th test.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
LEFT_OUT = (
    "test_a_parameter_given_twice",  # a race on purpose, which writes the same: the interpreter takes any for a fault
    "test_rows_further_apart_than_32_bits_reach",  # 2 GiB, and the interpreter keeps 16 bytes for each byte
    "test_more_than_32_bits_count",  # the same
    "test_the_host_never_waits",  # asks CUDA itself
)
COUNT = 200_000  # inputs of tests/gpu/test_accuracy.py, which takes ten million on a GPU


def pytest_configure(config: pytest.Config) -> None:
    from .. import gpu  # noqa: F401
    from ..gpu import cases

    cases.DEVICE = CPU


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a GPU runs."""
    items[:] = [item for item in items if not item.name.startswith(LEFT_OUT)]
    for item in items:
        item.own_markers = [m for m in item.own_markers if m.kwargs.get("reason", "")[:6] != "no GPU"]
        if item.path.name == "test_accuracy.py":
            item.module.COUNT = COUNT  # type: ignore[attr-defined]
    items[:] = items[:: int(os.environ.get("PTX_EVERY", "1"))]


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Any:
    """The fixture `device` is the CPU."""
    if fixturedef.argname != "device":
        return None
    fixturedef.cached_result = CPU, fixturedef.cache_key(request), None
    return CPU


@pytest.fixture(scope="session", autouse=True)
def on_compiled_ptx() -> Iterator[Any]:
    from triton_thresh import tuning

    from .driver import PtxDriver, on_ptx, small

    folder = Path(tempfile.gettempdir(), f"triton-thresh-ptx-{os.getuid()}")  # the same for all processes
    sizes = small if os.environ.get("PTX_SMALL") == "1" else tuning.default
    arch, mode = int(os.environ.get("PTX_ARCH", "90")), os.environ.get("PTX_APPROXIMATE", "exact")
    with on_ptx(PtxDriver(arch, folder, mode), sizes) as driver:  # type: ignore[arg-type]
        yield driver
