"""Where tests run, and which of them.

`INTERPRETED` says that Triton's interpreter stands in for a GPU in this process. `FULL` says that cases are tried in every
combination, for which a GPU has time: interpreted and executed kernels are tried in a share of them.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator

import pytest
import torch

from .rows import BASE_NAMES, OPS, RULE_CLASSES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FULL = torch.cuda.is_available() and not INTERPRETED
SUBJECTS = {*OPS, *BASE_NAMES, *(rule.__name__ for rule in RULE_CLASSES)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run what is marked `matrix`, and nothing else")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """No garbage is looked for among the ten thousand cases that are made and kept: that took a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def deselect(config: pytest.Config, items: list[pytest.Item], left_out: list[pytest.Item]) -> None:
    """Take items out of a run, which then counts them as deselected."""
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def without_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none. One case of each test stands for all of its cases, which are thousands."""
    if torch.cuda.is_available() or config.pluginmanager.has_plugin("tests.ptx.plugin"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for first, *others in cases.values():
        reason = f"no GPU: torch.cuda.is_available() is false ({1 + len(others)} cases)"
        first.add_marker(pytest.mark.skip(reason=reason))
        deselect(config, items, others)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow the notebooks, and every case of a test but the first for each op, base and rule that it names."""
    wanted = config.getoption("--matrix")
    deselect(config, items, [item for item in items if (item.get_closest_marker("matrix") is not None) != wanted])
    without_gpu(config, items)
    seen = set()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        subject = test, frozenset(SUBJECTS.intersection(re.split(r"[-\[\]]", case)))
        if subject in seen or item.path.suffix == ".ipynb":  # run by nbmake
            item.add_marker(pytest.mark.slow)
        seen.add(subject)
