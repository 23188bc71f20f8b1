"""Which cases `make test` runs; `make ptx` runs the product."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ..rows import square

sampled = functools.partial(square, mark=pytest.mark.ptx)


def some(values: Sequence[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """All values, marked but for those that are kept."""
    return [case(kept(value), value) for value in values]


def case(kept: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if kept else pytest.mark.ptx)
