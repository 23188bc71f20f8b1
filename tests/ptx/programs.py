"""Small kernels, and what they must give by numpy, torch and fractions: by these the machine itself is judged.

Each program is a function without arguments, to be called while a PtxDriver is entered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INF, NAN = math.inf, math.nan
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
N = 256

PROGRAMS: dict[str, Callable[[], None]] = {}


def program(check: Callable[[], None]) -> Callable[[], None]:
    PROGRAMS[check.__name__] = check
    return check


def equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN for NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    own = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    found = actual.view(own) == expected.view(own)
    if actual.is_floating_point():
        found |= actual.isnan() & expected.isnan()
    assert found.all(), (actual[~found][:4], expected[~found][:4])


def floats(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of all magnitudes, ties and numbers that go wrong easily, in random order."""
    draw = torch.Generator().manual_seed(seed)
    hard = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 3.4e38, 65504.0, 65520.0, 6e-8]
    hard += [0.5, 2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1e-310, 1.7e308, -1e160]
    wide = torch.randn(n, generator=draw, dtype=torch.float64) * 10 ** (
        60 * torch.rand(n, generator=draw).double() - 30
    )
    near = torch.randn(n, generator=draw).double()
    tied = (near * 64).round() / 64 + 2.0**-9 * torch.randint(-2, 3, (n,), generator=draw)
    x = torch.stack([wide, near, tied])[torch.randint(0, 3, (n,), generator=draw), torch.arange(n)]
    x[torch.randperm(n, generator=draw)[: len(hard)]] = torch.tensor(hard, dtype=torch.float64)
    return x.to(dtype)


def integers(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """All of a dtype's numbers alike, its ends, and ties of rounding to 8 digits."""
    draw, info = torch.Generator().manual_seed(seed), torch.iinfo(dtype)
    x = torch.randint(max(info.min, -(2**62)), min(info.max, 2**62), (n,), generator=draw, dtype=dtype)
    hard = [info.min, info.max, 0, -1, *([(257 << 18) + 1, -(2049 << 18) - 1] if info.bits > 16 else [])]
    x[: len(hard)] = torch.tensor(hard, dtype=dtype)
    return x


# ----------------------------------------------------------------------------------------------------------- conversions


@triton.jit
def k_cast(x, outs, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + o, mask=o < n)
    for i in tl.static_range(len(outs)):
        tl.store(outs[i] + o, value.to(outs[i].dtype.element_ty), mask=o < n)


@program
def casts_of_floats() -> None:
    for dtype in FLOATS:
        x = floats(300, dtype)
        outs = [torch.zeros(300, dtype=to) for to in FLOATS]
        k_cast[(2,)](x, tuple(outs), 300, N, num_warps=2)
        for out in outs:
            equal(out, x.to(out.dtype))
    x = torch.cat(
        [
            floats(N - 8, torch.float32).clamp(-2e9, 2e9).nan_to_num(0),
            torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.9, -128.9, 7.0]),
        ]
    )
    out = torch.zeros(N, dtype=torch.int32)
    k_cast[(1,)](x, (out,), N, N, num_warps=2)
    equal(out, x.to(torch.int32))


@program
def casts_of_integers() -> None:
    """To bfloat16 sm_90 rounds the integer once, and sm_80 by way of float32."""
    arch = triton.runtime.driver.active.get_current_target().arch
    for dtype in (*INTEGERS, torch.uint8):
        x = integers(N, dtype)
        outs = [torch.zeros(N, dtype=to) for to in (*FLOATS, *INTEGERS)]
        k_cast[(1,)](x, tuple(outs), N, N, num_warps=2)
        for out in outs:
            if out.dtype in (torch.float16, torch.bfloat16) and arch >= 90:
                once = [rounded_once(int(v), out.dtype) for v in x]
                equal(out, torch.tensor(once, dtype=torch.float64).to(out.dtype))
            else:
                equal(out, x.to(out.dtype))


def rounded_once(value: int, dtype: torch.dtype) -> float:
    """An integer as the nearest of a 16-bit type, ties to even, in exact arithmetic."""
    digits = 8 if dtype == torch.bfloat16 else 11
    unit = Fraction(2) ** (abs(value).bit_length() - digits)
    found = float(round(Fraction(abs(value)) / unit) * unit)  # of a Fraction round() is to even
    return math.copysign(found if found < 65520 or digits == 8 else INF, value)


# -------------------------------------------------------------------------------------------------------------- integers


@triton.jit
def k_divide(a, b, out, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(a + o), tl.load(b + o)
    tl.store(out + o, x // y)
    tl.store(out + N + o, x % y)
    tl.store(out + 2 * N + o, x // 7 + x % 10)


@program
def division_of_integers() -> None:
    for dtype in (torch.int16, torch.int32, torch.int64):
        a, b = integers(N, dtype), integers(N, dtype, 1) % 99 - 50
        b[b == 0] = 1
        a[a == torch.iinfo(dtype).min] += 1
        out = torch.zeros(3 * N, dtype=dtype)
        k_divide[(1,)](a, b, out, N, num_warps=2)

        def quotient(x: Tensor, y: Any) -> Tensor:
            return torch.div(x, y, rounding_mode="trunc")

        equal(out, torch.cat([quotient(a, b), torch.fmod(a, b), quotient(a, 7) + torch.fmod(a, 10)]))


@triton.jit
def k_channels(x, out, inner, mid, N: tl.constexpr):
    o = tl.arange(0, N)
    u = tl.load(x + o).to(tl.uint32, bitcast=True)
    tl.store(out + o, ((u // tl.cast(inner, tl.uint32)) % tl.cast(mid, tl.uint32)).to(tl.int32, bitcast=True))


@program
def places_in_channels() -> None:
    """Unsigned, which matters from 2**31 on."""
    x = integers(N, torch.int32)
    for inner in (1, 3):
        out = torch.zeros_like(x)
        k_channels[(1,)](x, out, inner, 100_000_007, N, num_warps=2)
        equal(out, ((x.long() % 2**32) // inner % 100_000_007).int())


@triton.jit
def k_bits(a, b, out, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(a + o), tl.load(b + o)
    u, v = x.to(tl.uint32, bitcast=True), y.to(tl.uint32, bitcast=True)
    tl.store(out + o, x * y)
    tl.store(out + N + o, (x >> (y & 31)) ^ (x << (y & 31)))
    tl.store(out + 2 * N + o, (u >> (v & 31)).to(tl.int32, bitcast=True) | (x & ~y))
    tl.store(out + 3 * N + o, tl.umulhi(u, v).to(tl.int32, bitcast=True))
    tl.store(out + 4 * N + o, tl.minimum(x, y) - tl.maximum(x, y))
    tl.store(out + 5 * N + o, ((x >> 8) & 255).to(tl.int8).to(tl.int32) + ((x >> 16) & 7))
    tl.store(out + 6 * N + o, tl.abs(x) + (-y) + (u > v).to(tl.int32) + (x < y).to(tl.int32))
    tl.store(out + 7 * N + o, (x.to(tl.int64) * y.to(tl.int64) >> 20).to(tl.int32))


@program
def bits() -> None:
    a, b = integers(N, torch.int32), integers(N, torch.int32, 1)
    out = torch.zeros(8 * N, dtype=torch.int32)
    k_bits[(1,)](a, b, out, N, num_warps=2)
    x, y = a.numpy(), b.numpy()
    u, v, s = x.view(np.uint32), y.view(np.uint32), y & 31
    with np.errstate(over="ignore"):
        rows = [
            x * y,
            (x >> s) ^ (x << s),
            (u >> s.astype(np.uint32)).view(np.int32) | (x & ~y),
            ((u.astype(object) * v.astype(object)) // 2**32).astype(np.uint32).view(np.int32),
            np.minimum(x, y) - np.maximum(x, y),
            (x >> 8 & 255).astype(np.uint8).view(np.int8).astype(np.int32) + (x >> 16 & 7),
            np.abs(x) - y + (u > v) + (x < y),
            (x.astype(np.int64) * y >> 20).astype(np.int32),
        ]
    equal(out, torch.from_numpy(np.concatenate(rows)))


# ---------------------------------------------------------------------------------------------------------------- floats


@triton.jit
def k_select(a, b, out, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(a + o), tl.load(b + o)
    tl.store(out + o, tl.maximum(x, y))
    tl.store(out + N + o, tl.minimum(x, y))
    tl.store(out + 2 * N + o, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * N + o, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 4 * N + o, tl.where(x > y, x, tl.where(x <= y, y, 7.0)))
    tl.store(out + 5 * N + o, tl.where(x == y, 1.0, 0.0) + tl.where(x != y, 2.0, 0.0) + tl.where(x >= y, 4.0, 0.0))
    tl.store(out + 6 * N + o, tl.where(x <= y, 0.0, x))
    tl.store(out + 7 * N + o, tl.abs(x))
    tl.store(out + 8 * N + o, -x)
    tl.store(out + 9 * N + o, tl.where(x >= y, 5.0, x))
    tl.store(out + 10 * N + o, tl.where(x < y, 5.0, x))
    tl.store(out + 11 * N + o, tl.where(x == x, y, 5.0))
    tl.store(out + 12 * N + o, tl.where((y >= -1.0) & (x <= 2.0), 0, 1).to(x.dtype))
    tl.store(out + 13 * N + o, tl.where((x > y) | (x < -2.0), 1, 0).to(x.dtype))


@program
def comparisons_and_extremes() -> None:
    """NaN and both zeros among them."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -1e-40, 2.0, 3.0, -3.0, 0.5, -0.5, 1e-45, 7.0])
    for dtype in FLOATS:
        a, b = values.repeat(16).to(dtype), values.repeat_interleave(16).to(dtype)
        out = torch.zeros(14 * N, dtype=dtype)
        k_select[(1,)](a, b, out, N, num_warps=2)
        zeros, nan, seven = (a == 0) & (b == 0), a.isnan() | b.isnan(), torch.tensor(7.0, dtype=dtype)
        largest = torch.where(zeros, torch.where(a.signbit() & b.signbit(), -0.0, 0.0).to(dtype), a.fmax(b))
        least = torch.where(zeros, torch.where(a.signbit() | b.signbit(), -0.0, 0.0).to(dtype), a.fmin(b))
        rows = [
            largest,
            least,
            torch.where(nan, NAN, largest),
            torch.where(nan, NAN, least),
            torch.where(a > b, a, torch.where(a <= b, b, seven)),
            (a == b).to(dtype) + 2 * (a != b).to(dtype) + 4 * (a >= b).to(dtype),
            torch.where(a <= b, 0, a),
            a.abs(),
            0 - a,  # which unary minus compiles to
            torch.where(a >= b, 5, a),
            torch.where(a < b, 5, a),
            torch.where(a == a, b, 5),
            1 - ((b >= -1) & (a <= 2)).to(dtype),
            ((a > b) | (a < -2)).to(dtype),
        ]
        equal(out, torch.cat(rows))


@triton.jit
def k_arithmetic(a, b, c, out, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y, z = tl.load(a + o), tl.load(b + o), tl.load(c + o)
    tl.store(out + o, x + y)
    tl.store(out + N + o, x - y)
    tl.store(out + 2 * N + o, x * y)
    tl.store(out + 3 * N + o, tl.fma(x, y, z))
    if x.dtype == tl.float32:
        tl.store(out + 4 * N + o, tl.div_rn(x, y))
        tl.store(out + 5 * N + o, tl.sqrt_rn(tl.abs(x)))
    elif x.dtype == tl.float64:
        tl.store(out + 4 * N + o, x / y)
        tl.store(out + 5 * N + o, tl.sqrt(tl.abs(x)))


@program
def arithmetic_is_rounded_once() -> None:
    for dtype in FLOATS:
        x, y = floats(N, dtype), floats(N, dtype, 1)
        cancels = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.7
        z = torch.where(cancels, (-(x.double() * y.double())).to(dtype), floats(N, dtype, 3))
        out = torch.zeros(6 * N, dtype=dtype)
        k_arithmetic[(1,)](x, y, z, out, N, num_warps=2, enable_fp_fusion=False)
        fma = [exactly(*each, dtype) for each in zip(x.tolist(), y.tolist(), z.tolist())]
        rows = [x + y, x - y, x * y, torch.tensor(fma, dtype=torch.float64).to(dtype)]
        if dtype in (torch.float32, torch.float64):
            rows += [x / y, torch.from_numpy(np.sqrt(x.abs().numpy()))]  # torch's own is not always rounded correctly
        equal(out[: len(rows) * N], torch.cat(rows))


def exactly(x: float, y: float, z: float, dtype: torch.dtype) -> float:
    """x * y + z rounded once, by fractions; the signs of zeros by floats."""
    if not all(map(math.isfinite, (x, y, z))) or 0.0 in (x, y):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return x * y + z if x * y != 0 else 0.0
    digits, least, most = {
        torch.float16: (11, -24, 16),
        torch.bfloat16: (8, -133, 128),
        torch.float32: (24, -149, 128),
        torch.float64: (53, -1074, 1024),
    }[dtype]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    found = round(size / unit) * unit
    return math.copysign(INF if found >= Fraction(2) ** most else float(found), exact)


@triton.jit
def k_functions(a, out, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(a + o)
    tl.store(out + o, tl.exp2(x))
    tl.store(out + N + o, tl.log2(tl.abs(x)))
    tl.store(out + 2 * N + o, tl.rsqrt(tl.abs(x)) if x.dtype == tl.float32 else 1.0 / tl.sqrt(tl.abs(x)))
    tl.store(out + 3 * N + o, 1.0 / x)
    tl.store(out + 4 * N + o, tl.exp(x))
    tl.store(out + 5 * N + o, tl.log(tl.abs(x)))
    tl.store(out + 6 * N + o, tl.floor(x) + tl.ceil(x))
    tl.store(out + 7 * N + o, libdevice.rint(x))


@program
def functions() -> None:
    """Within two units in the last place; of float32's exp, whose argument is rounded, in proportion to that."""
    hard = [0.0, -0.0, INF, -INF, NAN, 1.0, 0.5, 2.5, -2.5, 100.0, -100.0, -140.0, 3.0, 0.25, 1e-30, 88.0]
    for dtype in (torch.float32, torch.float64):
        wide = torch.randn(N - 16, generator=torch.Generator().manual_seed(4), dtype=dtype) * 20
        x = torch.cat([wide, torch.tensor(hard, dtype=dtype)])
        out = torch.zeros(8 * N, dtype=dtype)
        k_functions[(1,)](x, out, N, num_warps=2)
        d, eps, single = x.double(), torch.finfo(dtype).eps, dtype == torch.float32
        rows = [
            d.exp2(),
            d.abs().log2(),
            d.abs().rsqrt(),
            1 / d,
            d.exp(),
            d.abs().log(),
            d.floor() + d.ceil(),
            d.round(),
        ]
        for i, (row, own) in enumerate(zip(rows, out.view(8, N).double())):
            row = torch.where(row.abs() > torch.finfo(dtype).max, row.sign() * INF, row)
            units = 0 if i > 5 else 2 + d.abs() / 2 if single and i == 4 else 2
            fine = (own - row).abs() <= eps * units * row.abs() + (1.2e-38 if single else 1e-307)
            fine |= (own == row) | (own.isnan() & row.isnan())
            assert fine.all(), (i, dtype, x[~fine][:4], own[~fine][:4], row[~fine][:4])


# --------------------------------------------------------------------------------------------------------------- threads


@triton.jit
def k_reduce(x, out, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    tl.store(out, tl.sum(v))
    tl.store(out + 1, tl.max(v))
    tl.store(out + 2, tl.argmax(v, 0))


@program
def reductions_across_warps() -> None:
    for dtype in (torch.float32, torch.int32, torch.float64):
        x = torch.randint(-(10**6), 10**6, (1024,), generator=torch.Generator().manual_seed(5)).to(dtype)
        x[777] = 10**6
        out = torch.zeros(3, dtype=dtype)
        k_reduce[(1,)](x, out, 1024, num_warps=8)
        equal(out, torch.stack([x.sum(dtype=dtype), x.max(), torch.tensor(777, dtype=dtype)]))


@triton.jit
def k_scan(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.cumsum(tl.load(x + o)))


@program
def cumulative_sums() -> None:
    x = torch.randint(-9, 9, (1024,), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    out = torch.zeros_like(x)
    k_scan[(1,)](x, out, 1024, num_warps=4)
    equal(out, x.cumsum(0, dtype=torch.int32))


@triton.jit
def k_count(x, out, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    counts = tl.histogram(tl.load(x + o, mask=o < n, other=0), 256, mask=o < n)
    tl.atomic_add(out + tl.arange(0, 256), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@program
def histograms_added_atomically() -> None:
    x = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    out = torch.ones(256, dtype=torch.int64)
    k_count[(4,)](x, out, 1000, N, num_warps=4)
    equal(out, x.bincount(minlength=256) + 1)


@triton.jit
def k_tile(x, down, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    v = tl.load(x + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])
    tl.store(down + tl.arange(0, COLS), tl.sum(v, 0))
    tl.store(across + tl.arange(0, ROWS), tl.sum(v, 1))


@program
def sums_of_a_tile() -> None:
    x = torch.randint(-99, 99, (32, 64), generator=torch.Generator().manual_seed(8)).float()
    down, across = torch.zeros(64), torch.zeros(32)
    k_tile[(1,)](x, down, across, 32, 64, num_warps=4)
    equal(down, x.sum(0))
    equal(across, x.sum(1))


@triton.jit
def k_loop(x, out, n, LIMIT: tl.constexpr, N: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros([N], tl.float32)
    i = 0
    while i < n // (pid + 1):
        o = i + tl.arange(0, N)
        total += tl.load(x + o, mask=o < n // (pid + 1), other=0.0)
        i += N
        if i > LIMIT:
            total = -total
    tl.store(out + pid * 2, tl.sum(total))
    tl.store(out + pid * 2 + 1, i)


@program
def loops_of_different_lengths() -> None:
    x = torch.randint(-9, 9, (2000,), generator=torch.Generator().manual_seed(9)).float()
    out = torch.zeros(10, 2)
    k_loop[(10,)](x, out, 2000, 600, 128, num_warps=4)
    for p in range(10):
        total, i, end = 0.0, 0, 2000 // (p + 1)
        while i < end:
            total += float(x[i : min(i + 128, end)].sum())
            i += 128
            total = -total if i > 600 else total
        assert out[p].tolist() == [total, i]


# ---------------------------------------------------------------------------------------------------------------- faults


@triton.jit
def k_copy(x, out, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + o, tl.load(x + o, mask=o < n))


@triton.jit
def k_clash(out, same):
    tl.store(out, tl.where(same != 0, 1, tl.program_id(0)))
