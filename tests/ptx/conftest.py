"""Tests of compiled kernels: no GPU, and Triton's interpreter off. One driver a process, so that no kernel is compiled twice."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ..conftest import INTERPRETED, deselect

if TYPE_CHECKING:
    from .driver import PtxDriver

if INTERPRETED or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


HERE = Path(__file__).parent
EVERYTHING = os.environ.get("PTX_EVERYTHING") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """None is quick, and another Triton may write instructions that the machine does not know. The rest is for `make ptx`."""
    own = [item for item in items if HERE in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.slow)
    if not EVERYTHING:
        deselect(config, items, [item for item in own if item.get_closest_marker("ptx")])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels lie: one folder for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "compiled"


@pytest.fixture(scope="session")
def session_driver(folder: Path) -> Iterator[PtxDriver]:
    from .driver import PtxDriver

    driver = PtxDriver(90, folder)
    yield driver
    driver.forget()


@pytest.fixture
def compiled(session_driver: PtxDriver) -> Iterator[PtxDriver]:
    """The pack runs CPU tensors by compiled PTX; memory that torch leaves uninitialised holds NaN, or 0xA5 bytes."""
    from ..interpreted.tools import poison
    from .driver import on_ptx

    with on_ptx(session_driver) as driver, poison():
        yield driver


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
