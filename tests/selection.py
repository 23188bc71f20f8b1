"""What the tests of thresholds.py and of kernels/select.py share: inputs and oracles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal in value, where zeros of either sign are equal, in shape and in dtype."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def nth(n: int) -> list[int]:
    """Ranks at both ends, in the middle, and among few."""
    return sorted({1, 2, n // 100, n // 3, n // 2, n - 1, n} & {*range(1, n + 1)})


def numbers(dtype: torch.dtype, n: int) -> Iterator[Tensor]:
    """Random; tied; all equal; and for floats infinities, zeros of both signs, denormal numbers, and NaN of both signs."""
    generator = torch.Generator().manual_seed(n)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        yield torch.randint(info.min, info.max, (n,), generator=generator, dtype=dtype)
        yield torch.randint(0, 4, (n,), generator=generator, dtype=dtype)
        extremes = torch.tensor([info.min, info.max, 0, 1, info.max - 1, info.min + 1], dtype=dtype)
        yield extremes[torch.arange(n) % 6]
        return
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    yield x.to(dtype)
    yield (x * 2).round().to(dtype)
    yield torch.full((n,), -1.5, dtype=dtype)
    info = torch.finfo(dtype)
    wild = [0.0, -0.0, info.max, info.min, info.smallest_normal, -info.smallest_normal / 2, torch.inf, -torch.inf]
    yield torch.tensor(wild, dtype=dtype)[torch.randint(0, len(wild), (n,), generator=generator)]
    nan = torch.tensor([torch.nan, -torch.nan, 1.0, -2.0], dtype=dtype)
    nan[1] = -nan[0]
    yield nan[torch.randint(0, 4, (n,), generator=generator)]
    yield nan[:2][torch.arange(n) % 2]


def batch_topk_of(x: Tensor, k: float) -> Tensor:
    """The int(k * rows) largest positive elements of a batch, and what ties with the smallest of them."""
    positive = x[x > 0]
    count = len(positive) if k >= x.numel() else min(int(k * x.shape[:-1].numel()), len(positive))
    if count == 0:
        return torch.zeros_like(x)
    return torch.where(x >= positive.topk(count).values[-1], x, 0)


def otsu_of(image: npt.NDArray[Any], bins: int = 256) -> Any:
    """skimage.filters.threshold_otsu(image, bins) of version 0.25, written out."""
    if (image == image.flat[0]).all():
        return image.flat[0]
    if np.issubdtype(image.dtype, np.integer):
        start = int(image.min())
        counts = np.bincount((image.astype(np.int64) - start).ravel())
        centers = np.arange(start, start + len(counts))
    else:
        counts, edges = np.histogram(image, bins)
        centers = (edges[:-1] + edges[1:]) / 2
    weights = counts.astype(np.float32)
    below, above = np.cumsum(weights), np.cumsum(weights[::-1])[::-1]
    mean_below = np.cumsum(weights * centers) / below
    mean_above = (np.cumsum((weights * centers)[::-1]) / above[::-1])[::-1]
    variance = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return centers[np.argmax(variance)]
