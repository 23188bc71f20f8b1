"""Which cases `make test` runs; `make ptx` runs the product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def sampled(*axes: Sequence[Any]) -> list[Any]:
    """The product, marked but for a Latin square: a case for each choice of all axes but the last."""
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places)]
        found.append(case(sum(places) % len(axes[-1]) == 0, *values))
    return found


def some(values: Sequence[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """All values, marked but for those that are kept."""
    return [case(kept(value), value) for value in values]


def case(kept: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if kept else pytest.mark.ptx)
