"""The committed largest errors are those of the kernels: with fewer inputs none is larger."""

from __future__ import annotations

import json

import pytest

from ..losses import PAIRS, Cell, name
from .accuracy import RESULT, WAYS, measured
from .driver import PtxDriver


@pytest.mark.ptx
@pytest.mark.parametrize("cell", PAIRS, ids=name)
def test_errors(cell: Cell, compiled: PtxDriver) -> None:
    (row,) = (r for r in json.loads(RESULT.read_text()) if (r["base"], r["rule"]) == (cell.base, cell.rule.__name__))
    try:
        found = measured(cell, compiled.approximate, count=2000)
    finally:
        compiled.approximate.mode = "exact"
    for kind in ("loss", "gradient"):
        for way in WAYS:
            assert found[kind][way] <= 1.2 * row[kind][way] + 0.2  # other inputs
