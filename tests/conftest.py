"""Where tests run: `interpreted` says whether Triton's interpreter stands in for a GPU in this process."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":  # run by nbmake
            item.add_marker("slow")
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(reason)
