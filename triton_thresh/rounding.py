"""Numbers as torch rounds them."""

from __future__ import annotations

import functools

import torch

HALF = frozenset({torch.float16, torch.bfloat16})


@functools.lru_cache(maxsize=1024)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def round_to(value: float, dtype: torch.dtype) -> float:
    """A number rounded to a floating dtype, through float32 for the 16-bit ones; zeros keep their sign."""
    if dtype is torch.float64 or value == 0:
        return value
    return _rounded(value, dtype)
