"""Selection on compiled PTX: rows in registers, long rows by digits, batch_topk, Otsu's threshold."""

from __future__ import annotations

import pytest
import torch

from ..kernels import test_select as select_tests
from .sample import some

pytestmark = pytest.mark.usefixtures("compiled")

SOME = (torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32)


@pytest.mark.parametrize("dtype", some(SOME, lambda dtype: dtype == torch.int32), ids=str)
def test_rows_in_registers(dtype: torch.dtype, device: torch.device) -> None:
    select_tests.test_rows_in_registers(dtype, device)


@pytest.mark.parametrize("dtype", some([torch.float16, torch.float32], lambda dtype: dtype == torch.float16), ids=str)
def test_by_digits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    select_tests.test_a_tensor_by_digits(dtype, monkeypatch, device)


def test_batch_topk(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    select_tests.test_batch_topk(torch.float32, True, monkeypatch, device)


@pytest.mark.ptx
def test_batch_topk_by_digits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    select_tests.test_batch_topk(torch.float32, False, monkeypatch, device)


@pytest.mark.ptx
def test_otsu_of_integers(device: torch.device) -> None:
    select_tests.test_otsu_of_integers(torch.uint8, device)


def test_otsu(device: torch.device) -> None:
    select_tests.test_otsu_of_floats(torch.float32, 100, device)
