"""Is the machine itself right? Small kernels on three targets, faults it must find, and mutations it must notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from . import approximation, instructions, machine, values
from .approximation import BOUNDS, Approximation
from .driver import PtxDriver
from .machine import Kernel
from .memory import FaultError, Global
from .parse import UnsupportedError
from .programs import PROGRAMS, k_clash, k_copy
from .sample import case

DIFFERS = (
    "casts_of_floats",
    "casts_of_integers",
    "comparisons_and_extremes",
    "arithmetic_is_rounded_once",
    "functions",
)


@pytest.mark.parametrize(
    ("arch", "name"), [case(arch == 90 or n in DIFFERS, arch, n) for arch in (80, 90, 100) for n in PROGRAMS]
)
def test_program(arch: int, name: str, folder: Path) -> None:
    with PtxDriver(arch, folder):
        PROGRAMS[name]()


# ------------------------------------------------------------------------------------------------------------- mutations

# Another meaning for an instruction, and the program that must turn red.
REWRITES = [
    (r"setp\.gtu\.f", "setp.gt.f", "comparisons_and_extremes"),
    (r"setp\.ltu\.f", "setp.lt.f", "comparisons_and_extremes"),
    (r"or\.pred", "and.pred", "comparisons_and_extremes"),
    (r"setp\.neu\.f", "setp.ne.f", "comparisons_and_extremes"),
    (r"setp\.nan\.", "setp.num.", "comparisons_and_extremes"),
    (r"max\.NaN\.", "max.", "comparisons_and_extremes"),
    (r"\bmin\.", "max.", "comparisons_and_extremes"),
    (r"setp\.lt\.s32", "setp.lt.u32", "bits"),
    (r"setp\.gt\.u32", "setp.gt.s32", "bits"),
    (r"max\.s32", "max.u32", "bits"),
    (r"shr\.s32", "shr.u32", "bits"),
    (r"shl\.b32", "shr.b32", "bits"),
    (r"mul\.hi\.u32", "mul.hi.s32", "bits"),
    (r"mul\.wide\.s32", "mul.wide.u32", "bits"),
    (r"and\.b32", "or.b32", "bits"),
    (r"xor\.b32", "or.b32", "bits"),
    (r"div\.s(\d+)", r"div.u\1", "division_of_integers"),
    (r"rem\.u32", "rem.s32", "places_in_channels"),
    (r"div\.u32", "div.s32", "places_in_channels"),
    (r"cvt\.s64\.s32", "cvt.u64.u32", "casts_of_integers"),
    (r"cvt\.rn\.f32\.s32", "cvt.rn.f32.u32", "casts_of_integers"),
    (r"cvt\.rzi\.s32", "cvt.rni.s32", "casts_of_floats"),
    (r"cvt\.rni\.", "cvt.rzi.", "functions"),
    (r"cvt\.rmi\.", "cvt.rpi.", "functions"),
    (r"ex2\.approx", "lg2.approx", "functions"),
    (r"\bsub(\.rn)?\.f32", "add.f32", "arithmetic_is_rounded_once"),
    (r"shfl\.sync\.bfly", "shfl.sync.idx", "reductions_across_warps"),
    (r"bar\.sync[^;]*;", "", "reductions_across_warps"),
    (r"shfl\.sync\.up", "shfl.sync.down", "cumulative_sums"),
    (r"popc\.b32\s+(%\w+), (%\w+)", r"mov.b32 \1, \2", "histograms_added_atomically"),
    (r"@(%p\d+) bra", r"@!\1 bra", "loops_of_different_lengths"),
]


@pytest.mark.parametrize(("old", "new", "name"), REWRITES)
def test_another_meaning_is_noticed(old: str, new: str, name: str, folder: Path) -> None:
    driver = PtxDriver(90, folder, rewrite=lambda text: re.sub(old, new, text))
    with driver, pytest.raises((AssertionError, UnsupportedError)):
        PROGRAMS[name]()
    assert driver.changed, "no kernel has this instruction"


def _truncated(x: Any) -> Any:
    return (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _as_numpy_has_it(a: Any, b: Any, largest: bool, nan: bool) -> Any:
    return (np.maximum if nan else np.fmax)(b, a) if largest else (np.minimum if nan else np.fmin)(b, a)


def _flushing(bits: Any, type: str, own: Callable[..., Any] = values.decode) -> Any:
    return values.flushed(own(bits, type)) if type == "f32" else own(bits, type)


PATCHES = [
    (values, "bfloat16", _truncated, "casts_of_floats"),
    (values, "bfloat16", lambda v, own=values.bfloat16: own(v.astype(np.float32)), "casts_of_integers"),
    (instructions, "fma", lambda a, b, c: a * b + c, "arithmetic_is_rounded_once"),
    (instructions, "extreme", _as_numpy_has_it, "comparisons_and_extremes"),
    (machine, "decode", _flushing, "arithmetic_is_rounded_once"),
]


@pytest.mark.parametrize(("module", "attribute", "value", "name"), PATCHES)
def test_other_arithmetic_is_noticed(module: Any, attribute: str, value: Any, name: str, folder: Path) -> None:
    with patch.object(module, attribute, value), PtxDriver(90, folder), pytest.raises(AssertionError):
        PROGRAMS[name]()


# ---------------------------------------------------------------------------------------------------------------- faults


def test_stray_accesses_and_races(folder: Path) -> None:
    x, out = torch.arange(256.0), torch.zeros(1, dtype=torch.int32)
    with PtxDriver(90, folder):
        with pytest.raises(FaultError, match="out of bounds"):
            k_copy[(1,)](x[:200], torch.zeros(256), 256, 256)
        with pytest.raises(FaultError, match="out of bounds"):
            k_copy[(1,)](x, torch.zeros(256)[:255], 256, 256)
        with pytest.raises(FaultError, match="in the same launch"):
            k_copy[(2,)](x, x[64:], 100, 64)
        with pytest.raises(FaultError, match=r"different values|another value"):
            k_clash[(2,)](out, 0)
        k_clash[(2,)](out, 1)


def _run(body: str, threads: int = 64, spans: Any = (), values: Any = ()) -> None:
    """A kernel of two warps and 256 bytes of shared memory."""
    parameters = ",\n".join(f".param .u64 p{i}" for i in range(len(values)))
    text = (
        f".extern .shared .align 16 .b8 global_smem[];\n.visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n{{\n"
        ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<9>;\n"
        f"mov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 2;\nxor.b32 %r3, %r2, 128;\n{body}\nret;\n}}\n"
    )
    Kernel(text, 256).launch((1, 1, 1), list(values), Global(spans, threads))


WRITES = "st.shared.b32 [%r2], %r1;\n"
APART = "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $L1;\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ld.shared.b32 %r4, [%r2];", "never written"),
        (WRITES + "ld.shared.b32 %r4, [%r3];", "no barrier"),
        (WRITES + "bar.sync 0;\nld.shared.b32 %r4, [%r3];\nst.shared.b32 [%r2], %r4;", "no barrier"),
        (APART + "bar.sync 0;\n$L1:", "elsewhere"),
        (APART + "shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;\n$L1:", "lanes are missing"),
        ("st.shared.v2.b32 [%r2], {%r1, %r1};", "misaligned"),
        ("mov.b64 %rd1, 64;\nld.global.b32 %r4, [%rd1];", "out of bounds"),
    ],
)
def test_faults(body: str, words: str) -> None:
    with pytest.raises(FaultError, match=words):
        _run(body)


def test_a_barrier_orders() -> None:
    _run(WRITES + "bar.sync 0;\nld.shared.b32 %r4, [%r3];")


@pytest.mark.parametrize(
    "text", ["sin.approx.f32 %r1, %r1;", "add.sat.s32 %r1, %r1, %r1;", "ld.global.b32 %q1, [%rd1];"]
)
def test_what_is_not_known_raises(text: str) -> None:
    with pytest.raises(UnsupportedError):
        _run(text)


def test_instructions_by_hand() -> None:
    """Against values worked out by hand from the PTX ISA."""
    cases = [
        ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
        ("prmt.b32 %r9, 0x00800000, 0, 0x222A;", 0x808080FF),
        ("bfe.s32 %r9, 0x000000F0, 4, 4;", 0xFFFFFFFF),
        ("bfe.u32 %r9, 0x000000F0, 4, 3;", 7),
        ("bfi.b32 %r9, 0x00000FA5, 0x11223344, 8, 12;", 0x112FA544),
        ("bfi.b32 %r9, 0x12345678, 0xFFFFFFFF, 0, 32;", 0x12345678),
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.s32 %r9, -8, 40;", 0xFFFFFFFF),
        ("max.f32 %r9, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("max.NaN.f32 %r9, 0f7FC00000, 0f3F800000;", 0x7FFFFFFF),
        ("max.f32 %r9, 0f80000000, 0f00000000;", 0),
        ("add.f32 %r9, 0f7F800000, 0fFF800000;", 0x7FFFFFFF),
        ("mul.ftz.f32 %r9, 0f00400000, 0f3F800000;", 0),
        ("mul.f32 %r9, 0f00800000, 0f3F000000;", 0x00400000),
        ("ex2.approx.ftz.f32 %r9, 0fC2FE0000;", 0),
        ("cvt.rni.s32.f32 %r9, 0f40200000;", 2),
        ("cvt.rzi.s32.f32 %r9, 0f7FC00000;", 0),
        ("cvt.rzi.s32.f32 %r9, 0f4F800000;", 0x7FFFFFFF),
        ("popc.b32 %r9, 0xF00F;", 8),
        ("vote.sync.ballot.b32 %r9, %p2, -1;", 0xAAAAAAAA),
    ]
    out = torch.zeros(64, 32, dtype=torch.int32)
    body = (
        "and.b32 %r5, %r1, 1;\nsetp.eq.s32 %p2, %r5, 1;\nld.param.b64 %rd1, [p0];\nmad.wide.u32 %rd2, %r1, 128, %rd1;\n"
    )
    body += "".join(f"{text}\nst.global.b32 [%rd2+{4 * i}], %r9;\n" for i, (text, _) in enumerate(cases))
    _run(body, spans=[(out.data_ptr(), out.data_ptr() + out.nbytes)], values=[out.data_ptr()])
    found = [int(v) & 0xFFFFFFFF for v in out[63]][: len(cases)]
    assert found == [value for _, value in cases]


@pytest.mark.parametrize("mode", ["random", "plus", "minus"])
@pytest.mark.parametrize(
    ("name", "function"), [("ex2", np.exp2), ("rsqrt", lambda v: 1 / np.sqrt(v)), ("lg2", np.log2)]
)
def test_errors_are_as_large_as_documented(name: str, function: Callable[[Any], Any], mode: approximation.Mode) -> None:
    x = np.random.default_rng(0).uniform(0.01, 20, 50_000).astype(np.float32)
    exact = function(x.astype(np.float64))
    size = np.maximum(np.abs(exact), 1) if name == "lg2" else np.abs(exact)
    worst = (np.abs(Approximation(mode)(name, exact, x) - exact) / size).max() / BOUNDS[name]
    assert 0.8 < worst <= 1
