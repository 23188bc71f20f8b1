"""The tools find what they are there to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.interpreted.tools import OutOfBoundsError, RawBfloat16Error, fix_bf16, sentinel_view, traffic

BLOCK = 1024
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@triton.jit
def copy(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o < n)


@triton.jit
def copy_strided(x_ptr, y_ptr, n, x_stride, y_stride, block: tl.constexpr):
    o = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y_ptr + o * y_stride, tl.load(x_ptr + o * x_stride, mask=o < n), mask=o < n)


@triton.jit
def scale(x_ptr, y_ptr, n, factor, block: tl.constexpr):
    o = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + o, mask=o < n).to(tl.float32)
    tl.store(y_ptr + o, x * factor, mask=o < n)


@triton.jit
def scale_unless_one(factor_ptr, x_ptr, n, block: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        o = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(x_ptr + o, tl.load(x_ptr + o, mask=o < n) * factor, mask=o < n)


@triton.jit
def raw_product(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n) * 2.0, mask=o < n)


@triton.jit
def raw_comparison(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    x = tl.load(x_ptr + o, mask=o < n)
    tl.store(y_ptr + o, tl.where(x > x, x, 0.0), mask=o < n)


@triton.jit
def raw_sum(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + o, mask=o < n, other=0.0)))


@triton.jit
def relu(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    x = tl.load(x_ptr + o, mask=o < n)
    tl.store(y_ptr + o, tl.where(x.to(tl.float32) > 0.0, x, 0.0), mask=o < n)


@triton.jit
def extremes(x_ptr, y_ptr, block: tl.constexpr):
    o = tl.arange(0, block)
    x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, tl.maximum(x, 1.0))
    tl.store(y_ptr + block + o, tl.minimum(x, 1.0))
    tl.store(y_ptr + 2 * block + o, tl.clamp(x, -1.0, 1.0))


@triton.jit
def count(counter_ptr):
    tl.atomic_add(counter_ptr, 1)


def run(kernel: Any, n: int, *arguments: Any) -> None:
    kernel[(triton.cdiv(n, BLOCK),)](*arguments, block=BLOCK)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("n", [1, 1000, 1024, 2500])
def test_traffic_counts_active_lanes(n: int, dtype: torch.dtype) -> None:
    x, y = torch.ones(n, dtype=dtype), torch.empty(n, dtype=dtype)
    with traffic(x=x, y=y, unused=None) as moved:
        run(copy, n, x, y, n)
    size = n * dtype.itemsize
    assert (moved.loaded, moved.stored, moved.total) == ({"x": size}, {"y": size}, 2 * size)
    assert moved.distinct("load", "x") == moved.distinct("store", "y") == size
    assert moved.most("load", "x") == moved.most("store", "y") == 1
    assert moved.distinct("load", "y") == moved.most("store", "unused") == 0


def test_traffic_tells_repeated_loads_from_distinct_bytes() -> None:
    x, y = torch.ones(1), torch.empty(100)
    with traffic(x=x, y=y) as moved:
        run(copy_strided, 100, x, y, 100, 0, 1)
    assert (moved.loaded["x"], moved.distinct("load", "x"), moved.most("load", "x")) == (400, 4, 100)


def test_traffic_sees_an_early_exit() -> None:
    x, factor = torch.ones(3000), torch.ones(())
    with traffic(x=x, factor=factor) as moved:
        run(scale_unless_one, 3000, factor, x, 3000)
    assert (moved.loaded, moved.stored) == ({"factor": 12}, {})
    with traffic(x=x, factor=factor.fill_(2)) as moved:
        run(scale_unless_one, 3000, factor, x, 3000)
    assert (moved.loaded, moved.stored) == ({"factor": 12, "x": 12000}, {"x": 12000})


def test_traffic_counts_atomics() -> None:
    counter = torch.zeros(2, dtype=torch.int32)
    with traffic(counter=counter) as moved:
        count[(5,)](counter)
    assert (moved.atomics, moved.distinct("atomic", "counter")) == ({"counter": 20}, 4)


@pytest.mark.parametrize("n", [1000, 1023, 1025])
def test_traffic_raises_on_stray_accesses(n: int) -> None:
    x, y = torch.ones(2048), torch.zeros(2048)
    with pytest.raises(OutOfBoundsError, match=r"load of \d+ elements outside of x, y"), traffic(x=x[:n], y=y):
        run(copy, n, x, y, 2048)
    with pytest.raises(OutOfBoundsError, match=r"store of \d+ elements outside"), traffic(x=x, y=y[-n:]):
        run(copy, n, x, y, 2048)


def test_traffic_keeps_other_errors() -> None:
    with pytest.raises(InterpreterError), traffic():
        count[(1,)](1)


def test_gaps_of_a_strided_tensor_are_not_its_own() -> None:
    both = torch.ones(64, 2)
    with traffic(left=both[:, 0], right=both[:, 1]) as moved:
        run(copy_strided, 64, both[:, 0], both[:, 1], 64, 2, 2)
    assert (moved.loaded, moved.stored) == ({"left": 256}, {"right": 256})
    with pytest.raises(OutOfBoundsError), traffic(left=both[:, 0], y=torch.empty(1)):
        run(copy_strided, 64, both[:, 1], both[:, 0], 64, 2, 2)


def test_shared_memory_goes_under_one_name() -> None:
    x = torch.ones(100)
    with traffic(x=(x, x.view(10, 10), x[5:])) as moved:
        run(copy, 100, x, x, 100)
    assert (moved.loaded, moved.stored) == ({"x": 400}, {"x": 400})
    with pytest.raises(ValueError, match="a and b share memory"), traffic(a=x, b=x[99:]):
        pass


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_bfloat16_is_rounded_to_nearest_even(given: torch.dtype) -> None:
    special = [torch.inf, -torch.inf, torch.nan, -0.0, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8, 65520.0]
    x = torch.cat([torch.randn(4000, dtype=given), torch.tensor(special, dtype=given)])
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    run(copy, x.numel(), x, y, x.numel())
    torch.testing.assert_close(y, x.to(torch.float32).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_products_are_rounded_when_stored() -> None:
    x, factor = torch.randn(5000).to(torch.bfloat16), torch.tensor(0.3)
    y = torch.empty_like(x)
    run(scale, 5000, x, y, 5000, 0.3)
    assert torch.equal(y, (x.float() * factor).to(torch.bfloat16))


def test_selection_may_stay_raw() -> None:
    x = torch.randn(1000).to(torch.bfloat16)
    y = torch.empty_like(x)
    run(relu, 1000, x, y, 1000)
    assert torch.equal(y, x.relu())


@pytest.mark.parametrize("kernel", [raw_product, raw_comparison, raw_sum])
def test_raw_bfloat16_arithmetic_raises(kernel: Any) -> None:
    x = torch.randn(1000).to(torch.bfloat16)
    with pytest.raises(InterpreterError) as caught:
        run(kernel, 1000, x, torch.zeros_like(x), 1000)
    assert RawBfloat16Error.__name__ in str(caught.value)
    fix_bf16(strict=False)
    try:
        run(kernel, 1000, x, torch.zeros_like(x), 1000)
    finally:
        fix_bf16()


def test_maximum_minimum_and_clamp_drop_nan() -> None:
    y = torch.empty(6)
    extremes[(1,)](torch.tensor([torch.nan, 3.0]), y, block=2)
    assert y.tolist() == [1.0, 3.0, 1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2, torch.complex64])
def test_uninitialised_floats_are_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 5, dtype=dtype)
    for tensor in created(like):
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (3, 5))
        assert torch.view_as_real(tensor).isnan().all() if dtype.is_complex else tensor.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_uninitialised_integers_are_a_pattern(dtype: torch.dtype) -> None:
    for tensor in created(torch.zeros(3, 5, dtype=dtype)):
        assert (tensor.flatten().view(torch.uint8) == 0xA5).all()


def created(like: torch.Tensor) -> list[torch.Tensor]:
    return [
        torch.empty(3, 5, dtype=like.dtype),
        torch.empty_like(like),
        torch.empty_strided((3, 5), (5, 1), dtype=like.dtype),
        torch.empty_permuted((3, 5), (0, 1), dtype=like.dtype),
        like.new_empty((3, 5)),
        like.new_empty_strided((3, 5), (5, 1)),
    ]


def test_poison_leaves_the_rest_alone() -> None:
    out = torch.zeros(4)
    torch.empty(4, out=out)
    assert not out.any()
    assert torch.empty(2, device="meta").is_meta
    assert torch.empty(0).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float64])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[::3, 1::2],
        lambda x: x[0, 0],
        lambda x: x[:0],
        lambda x: x[:1].expand(7, -1),
        lambda x: x.reshape(2, 6, 4, 2).to(memory_format=torch.channels_last),
    ],
    ids=["dense", "transposed", "sliced", "0-dim", "empty", "expanded", "channels_last"],
)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_sentinel_view_keeps_values_and_layout(
    offset: int, layout: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    tensor = layout(torch.randn(12, 8).to(dtype))
    view, check = sentinel_view(tensor, offset)
    assert torch.equal(view, tensor)
    assert (view.dtype, view.stride()) == (tensor.dtype, tensor.stride())
    assert (view.storage_offset() - offset) * dtype.itemsize % 16 == 0
    check()


@pytest.mark.parametrize("stray", [-1, 1, 23, 24, 1000])
def test_sentinel_view_finds_stray_writes(stray: int) -> None:
    view, check = sentinel_view(torch.zeros(12, 2)[:, 0])
    view.fill_(1.0)
    check()
    view.as_strided((), (), view.storage_offset() + stray).fill_(1.0)
    with pytest.raises(AssertionError, match=f"4 bytes written outside of the view, the first {4 * stray} from it"):
        check()


def test_guarded_tensors_run_in_kernels(guarded: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(777)
    source, target = guarded(x), guarded(torch.zeros(777), offset=3)
    run(copy, 777, source, target, 777)
    assert torch.equal(target, x)
