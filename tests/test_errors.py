"""What gates refuse: the error says what was wrong, and nothing of the caller's has changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh.backend import interpreting
from triton_thresh.checks import OutOfRange

from .gates import GATES, INPLACE, LEARNED, bits, label
from .rows import OPS

FLOATING_ONLY = [op for op in GATES if torch.int64 not in op.dtypes]
INTEGRAL = [op for op in GATES if torch.int64 in op.dtypes]
CASTING = [op for op in INTEGRAL if op.casts]
WITH_CONSTANTS = [op for op in GATES if op.constants]
NOT_LEARNED = [op for op in GATES if not op.learns]
NONNEGATIVE = [op for op in GATES if op.nonnegative]
WITH_DTYPE = [OPS["binary_threshold"]]

gates = pytest.mark.parametrize("op", GATES, ids=label)


@pytest.fixture(autouse=True, params=["eager", "triton"] if interpreting() else ["eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with tt.use_backend(request.param):
        yield


def state(tensor: Tensor) -> tuple[object, ...]:
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return ()
    version = None if tensor.is_inference() else tensor._version
    kinds = tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.is_leaf, tensor.grad_fn
    return (*kinds, version, bits(tensor).tolist())


@contextmanager
def refused(error: type[Exception], *words: object, of: tuple[object, ...]) -> Iterator[None]:
    """The error is raised with all these words, and the tensors are as they were."""
    tensors = [value for value in of if isinstance(value, Tensor)]
    before = [state(tensor) for tensor in tensors]
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error
    missing = [str(word) for word in words if not re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", message)]
    assert not missing, f"{missing} not in {message!r}"
    assert [state(tensor) for tensor in tensors] == before


def example(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape or (6,)).numel()).reshape(shape or (6,))


# --------------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16], ids=label)
@gates
def test_dtype_of_the_input(op: Any, dtype: torch.dtype) -> None:
    x = torch.zeros(4, dtype=dtype)
    with refused(TypeError, op.name, "input", dtype, "float16", of=(x,)):
        op(x, *op.example)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=label)
@pytest.mark.parametrize("op", FLOATING_ONLY, ids=label)
def test_integers_where_torch_takes_none(op: Any, dtype: torch.dtype) -> None:
    x = torch.zeros(4, dtype=dtype)
    with refused(TypeError, op.name, dtype, "float32", of=(x,)):
        op(x, *op.example)


@pytest.mark.parametrize("x", [[1.0, 2.0], 1.0, None, "x"], ids=["list", "number", "none", "string"])
@gates
def test_input_that_is_no_tensor(op: Any, x: Any) -> None:
    with refused(TypeError, op.name, "input", type(x).__name__, of=()):
        op(x, *op.example)


@gates
def test_sparse_input(op: Any) -> None:
    x = torch.eye(3).to_sparse()
    with refused(TypeError, op.name, "torch.sparse_coo", "strided", of=(x,)):
        op(x, *op.example)


# ----------------------------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize("shape", [(4,), (2, 1), (2, 2, 3), (1, 2, 3), (0,), (3, 2)], ids=str)
@gates
def test_shape_of_the_threshold(op: Any, shape: tuple[int, ...]) -> None:
    x, t = example(2, 3), torch.ones(shape)
    if shape == (2, 1):
        x = x.T
    with refused(ValueError, op.name, op.names[0], shape, tuple(x.shape), of=(x, t)):
        op(x, t, *op.example[1:])


@gates
def test_threshold_wider_than_the_input(op: Any) -> None:
    """Broadcasting goes to the input's shape, never the other way."""
    x, t = torch.tensor(0.3), torch.ones(3)
    with refused(ValueError, op.name, op.names[0], (3,), (), of=(x, t)):
        op(x, t, *op.example[1:])


@pytest.mark.parametrize("shape", [(), (1,), (6,)], ids=str)
@gates
def test_device_of_the_threshold(op: Any, shape: tuple[int, ...]) -> None:
    x, t = example(), torch.ones(shape, device="meta")
    with refused(RuntimeError, op.name, op.names[0], "meta", "cpu", of=(x, t)):
        op(x, t, *op.example[1:])


@pytest.mark.parametrize("t", ["0.5", None, [0.5], 1j, (1,)], ids=["string", "none", "list", "complex", "tuple"])
@gates
def test_threshold_that_is_no_number(op: Any, t: Any) -> None:
    x = example()
    with refused(TypeError, op.name, op.names[0], "number or a tensor", type(t).__name__, of=(x,)):
        op(x, t, *op.example[1:])


@pytest.mark.parametrize("shape", [(), (6,)], ids=str)
@gates
def test_complex_threshold(op: Any, shape: tuple[int, ...]) -> None:
    x, t = example(), torch.ones(shape, dtype=torch.complex64)
    with refused(TypeError, op.name, op.names[0], torch.complex64, "real", of=(x, t)):
        op(x, t, *op.example[1:])


@pytest.mark.parametrize("shape", [(), (6,)], ids=str)
@pytest.mark.parametrize("op", NOT_LEARNED, ids=label)
def test_threshold_that_wants_a_gradient(op: Any, shape: tuple[int, ...]) -> None:
    x, t = example(), torch.full(shape, 0.5, requires_grad=True)
    with refused(ValueError, op.name, op.names[0], "requires grad", "jumprelu", "detach", of=(x, t)):
        op(x, t, *op.example[1:])
    expected = op(x, t.detach(), *op.example[1:])
    with torch.no_grad():
        assert torch.equal(op(x, t, *op.example[1:]), expected)


@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_threshold_that_learns(op: Any) -> None:
    assert op(example(), torch.tensor(0.5, requires_grad=True)).requires_grad


@pytest.mark.parametrize("t", [-0.5, -1, float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("op", NONNEGATIVE, ids=label)
def test_negative_threshold(op: Any, t: float) -> None:
    x = example()
    with refused(OutOfRange, op.name, op.names[0], "at least 0", of=(x,)):
        op(x, t, *op.example[1:])


# ----------------------------------------------------------------------------------------------------------- constants


NOT_NUMBERS = {"string": "1", "none": None, "complex": 1j, "1dim": torch.ones(1), "complex0dim": torch.tensor(1j)}


@pytest.mark.parametrize("value", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
@pytest.mark.parametrize("op", WITH_CONSTANTS, ids=label)
def test_constants_that_are_no_numbers(op: Any, value: Any) -> None:
    x = example()
    with refused(TypeError, op.name, op.constants[0], "must be a number", of=(x, value)):
        op(x, 0.5, value)


def test_constant_on_another_device() -> None:
    x, value = example(), torch.ones((), device="meta")
    with refused(TypeError, "threshold", "value", "must be a number", "meta", of=(x,)):
        tt.threshold(x, 0.5, value)


@pytest.mark.parametrize(("dtype", "value"), [(torch.uint8, 256), (torch.int8, -129), (torch.int32, 2**31)], ids=str)
@pytest.mark.parametrize("op", CASTING, ids=label)
def test_numbers_an_integer_input_cannot_hold(op: Any, dtype: torch.dtype, value: int) -> None:
    x, info = torch.arange(4).to(dtype), torch.iinfo(dtype)
    for i in range(2):
        arguments = [1, 1]
        arguments[i] = value
        with refused(RuntimeError, op.name, op.names[i], value, dtype, info.max, of=(x,)):
            op(x, *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("op", CASTING, ids=label)
def test_numbers_that_are_no_integers(op: Any, value: float) -> None:
    x = torch.arange(4)
    with refused(RuntimeError, op.name, op.names[0], value, torch.int64, of=(x,)):
        op(x, value, 0)


@pytest.mark.parametrize("op", WITH_DTYPE, ids=label)
def test_numbers_the_result_cannot_hold(op: Any) -> None:
    x = example()
    with refused(RuntimeError, op.name, "above_value", 256, torch.uint8, of=(x,)):
        op(x, 0.5, 256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, "float32", float], ids=str)
@pytest.mark.parametrize("op", WITH_DTYPE, ids=label)
def test_dtype_of_the_result(op: Any, dtype: Any) -> None:
    x = example()
    with refused(TypeError, op.name, "dtype", dtype, "float16", of=(x,)):
        op(x, 0.5, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ in place


inplace = pytest.mark.parametrize("op", INPLACE, ids=label)


@inplace
def test_inplace_on_a_leaf(op: Any) -> None:
    x = example().requires_grad_()
    with refused(RuntimeError, f"{op.name}: a leaf Variable that requires grad", "in-place", of=(x,)):
        op(x, *op.example, inplace=True)


@inplace
def test_inplace_on_a_view_of_a_leaf(op: Any) -> None:
    x = example().requires_grad_()
    view = x[1:]
    with refused(RuntimeError, op.name, "view of a leaf Variable", of=(x,)):
        op(view, *op.example, inplace=True)


@inplace
def test_inplace_on_overlapping_memory(op: Any) -> None:
    x = example(3, 1).expand(3, 4)
    with refused(RuntimeError, op.name, "share memory", (3, 4), (1, 0), "clone", of=(x,)):
        op(x, *op.example, inplace=True)


@inplace
def test_inplace_on_an_inference_tensor(op: Any) -> None:
    with torch.inference_mode():
        x = example()
    with refused(RuntimeError, op.name, "inference tensor", "clone", of=(x,)):
        op(x, *op.example, inplace=True)


@inplace
def test_inplace_with_other_errors_writes_nothing(op: Any) -> None:
    x = example()
    with refused(ValueError, op.name, (7,), (6,), of=(x,)):
        op(x, torch.ones(7), inplace=True)


# ------------------------------------------------------------------------------------------------------------- backend


@pytest.mark.skipif(interpreting(), reason="here Triton's interpreter runs CPU tensors")
@gates
def test_triton_on_a_cpu(op: Any) -> None:
    x = example()
    with tt.use_backend("triton"), refused(RuntimeError, "triton", of=(x,)):
        op(x, *op.example)


@pytest.mark.skipif(interpreting() or not tt.backend.has_triton(), reason="needs Triton, without its interpreter")
def test_triton_on_a_cpu_names_the_way_out() -> None:
    with tt.use_backend("triton"), refused(RuntimeError, "cpu", "TRITON_INTERPRET=1", "auto", of=()):
        tt.hardshrink(example())


@pytest.mark.parametrize("choose", [tt.set_backend, tt.use_backend])
def test_unknown_backend(choose: Any) -> None:
    before = tt.get_backend()
    with refused(ValueError, "gpu", "auto", "triton", "eager", of=()), choose("gpu"):
        pass
    assert tt.get_backend() == before
