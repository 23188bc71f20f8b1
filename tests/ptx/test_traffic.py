"""Bytes that compiled PTX loads and stores, to the budgets that tests/kernels/test_traffic.py holds the interpreter to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ..gates import DIFFERENTIABLE, LEARNED, label
from ..interpreted.tools import Traffic
from ..kernels import test_traffic as traffic_tests
from ..kernels.test_losses import DIAGONAL
from ..losses import PAIRS, Cell, name
from ..rows import LEARNED_GATES, Gate
from .driver import PtxDriver, small
from .sample import sampled, some

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPANS = traffic_tests.SPANS


@pytest.fixture(autouse=True)
def counted(compiled: PtxDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's counter is replaced by the machine's."""

    @contextmanager
    def traffic(**tensors: Tensor | Sequence[Tensor] | None) -> Iterator[Traffic]:
        moved = Traffic(tensors)
        compiled.note = moved.note
        try:
            yield moved
        finally:
            compiled.note = None

    monkeypatch.setattr(traffic_tests, "traffic", traffic)


@pytest.fixture
def elements(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], int]:
    """Tells the budgets the block sizes of a dtype; gives a number of elements with full tiles and a tail in 8 rows."""

    def tell(dtype: torch.dtype) -> int:
        cols, block = small("gate", dtype.itemsize).block, small("loss", dtype.itemsize).block
        monkeypatch.setattr(traffic_tests, "COLS", cols)
        monkeypatch.setattr(traffic_tests, "LOSS_BLOCK", block)
        return 8 * cols + 1000

    return tell


Elements = Callable[[torch.dtype], int]


@pytest.mark.parametrize(("op", "dtype"), sampled(DIFFERENTIABLE, FLOATS), ids=label)
def test_gate(op: Gate, dtype: torch.dtype, elements: Elements) -> None:
    traffic_tests.test_gate(op, dtype, elements(dtype))


@pytest.mark.parametrize("spans", ["row", "element"])
@pytest.mark.parametrize("op", some(DIFFERENTIABLE, lambda op: op.name == "hardshrink"), ids=label)
def test_gate_by_threshold(op: Gate, spans: str, elements: Elements) -> None:
    traffic_tests.test_gate_by_threshold(op, SPANS[spans], elements(torch.bfloat16))


LEARNS = LEARNED + list(LEARNED_GATES.values())


@pytest.mark.parametrize("op", some(LEARNS, lambda op: op.name == "jumprelu_l0"), ids=label)
def test_threshold_that_learns(op: Any, elements: Elements) -> None:
    elements(torch.bfloat16)
    traffic_tests.test_threshold_per_element_that_learns(op)


@pytest.mark.parametrize("cell", some(PAIRS, lambda cell: cell in DIAGONAL), ids=name)
def test_loss(cell: Cell, elements: Elements) -> None:
    traffic_tests.check_reduction(cell, torch.float32, "mean", elements(torch.float32))


@pytest.mark.parametrize("dtype", some(FLOATS, lambda dtype: dtype == torch.float16), ids=label)
def test_reduction(dtype: torch.dtype, elements: Elements) -> None:
    traffic_tests.check_reduction(("bce", PAIRS[0].rule), dtype, "mean", elements(dtype))


@pytest.mark.parametrize(
    "dtype", some([torch.bfloat16, torch.float32], lambda dtype: dtype == torch.bfloat16), ids=label
)
def test_rescaling_and_no_reduction(dtype: torch.dtype, elements: Elements) -> None:
    traffic_tests.test_rescaling_backward(dtype, elements(dtype))
    traffic_tests.test_loss_without_reduction(dtype, elements(dtype))


def test_options(elements: Elements) -> None:
    elements(torch.float32)
    traffic_tests.test_options(True)
