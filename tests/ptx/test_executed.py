"""The committed counts of executed instructions are those of the kernels."""

from __future__ import annotations

import json

import pytest

from triton_thresh import tuning

from .driver import PtxDriver, on_ptx
from .executed import RESULT, calls, measured
from .sample import some

COMMITTED = json.loads(RESULT.read_text())


@pytest.mark.parametrize("name", some(list(COMMITTED), lambda name: name in ("hardshrink", "bce-ByPrediction")))
def test_instructions(name: str, session_driver: PtxDriver) -> None:
    with on_ptx(session_driver, tuning.default) as driver:
        found = measured(driver, dict(calls())[name])
    assert found == COMMITTED[name], "run python -m tests.ptx.executed"
