"""Approximate instructions, as wrong as NVIDIA documents them.

The bounds are those of the PTX ISA, in its chapter on floating point instructions; where its editions differ, the wider one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .values import Array

Mode = Literal["exact", "random", "plus", "minus"]

# Relative errors. Of lg2 it is an absolute one for arguments from 1/2 to 2.
BOUNDS = {
    "ex2": 2**-22,  # ex2.approx.ftz.f32
    "lg2": 2**-22,  # lg2.approx.ftz.f32
    "rsqrt": 2**-22.9,  # rsqrt.approx.ftz.f32
    "sqrt": 2**-23,  # sqrt.approx.ftz.f32
    "rcp": 2**-23,  # rcp.approx.ftz.f32
    "div": 2**-22,  # div.full.f32: 2 ulp
}


@dataclass
class Approximation:
    """How they err: not beyond rounding ("exact"), or within the bound at random, or as far up or down as it goes."""

    mode: Mode = "exact"

    def __call__(self, name: str, exact: Array, *inputs: Array) -> Array:
        """The float32 result for the exact one, a float64. The same inputs have the same result."""
        near = exact.astype(np.float32)
        if self.mode == "exact":
            return near
        share = _scattered(near.shape, inputs) if self.mode == "random" else 1.0 if self.mode == "plus" else -1.0
        size = np.abs(exact)
        if name == "lg2":
            size = np.maximum(size, 1.0)
        bound = BOUNDS[name] * size
        moved = (exact + share * bound).astype(np.float32)
        beyond = np.abs(moved.astype(np.float64) - exact) > bound
        moved = np.where(beyond, np.nextafter(moved, near), moved)
        known = (name == "ex2") & (inputs[0] == 0) | (name == "lg2") & (inputs[0] == 1)
        return np.where(~np.isfinite(exact) | (exact == 0) | known, near, moved)


def _scattered(shape: tuple[int, ...], inputs: tuple[Array, ...]) -> Array:
    """Numbers from -1 to 1 that depend on the inputs alone."""
    h = np.zeros(shape, np.uint32)
    for x in inputs:
        h = (h ^ x.view(np.uint32)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        h ^= h >> np.uint32(16)
    return h / 2.0**31 - 1
