"""Data bundled with scikit-learn, in ten folds: every row is held out once.

Arrays begin with the dimension of the folds, so that ten models train side by side.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_image
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor

Array: TypeAlias = NDArray[Any]

FOLDS = 10
NOISE = 0.1  # standard deviation, on pixels in [0, 1]
PATCH = 8  # pixels along a side
PHOTOGRAPHS = "china.jpg", "flower.jpg"
PATCHES = 53, 80  # of a photograph: rows and columns


@dataclass(frozen=True)
class Data:
    """Inputs are [folds, rows, features]; `test_rows` says where the held-out rows stand in the whole."""

    train_input: Tensor
    train_target: Tensor
    test_input: Tensor
    test_truth: Array
    test_rows: Array

    def first(self, folds: int) -> "Data":
        return Data(*(getattr(self, field.name)[:folds] for field in fields(self)))


def folds(rows: int, seed: int, classes: Array | None = None) -> list[tuple[Array, Array]]:
    """Indices of the rows to learn from and of those held out; a remainder of up to nine rows is left out."""
    rows -= rows % FOLDS
    kind = KFold if classes is None else StratifiedKFold
    split = kind(FOLDS, shuffle=True, random_state=seed)
    return list(split.split(np.empty(rows), None if classes is None else classes[:rows]))


def stacked(arrays: Iterable[Array]) -> Tensor:
    together = np.stack(list(arrays))
    return torch.as_tensor(together, dtype=None if together.dtype == np.int64 else torch.float32)


def assembled(
    parts: list[tuple[Array, Array]], of: Callable[[Array, Array], tuple[Array, Array, Array, Array]]
) -> Data:
    """`of` makes train input, train target, test input and test truth from the indices of a fold."""
    made = [of(train, test) for train, test in parts]
    train_input, train_target, test_input, truth = zip(*made)
    rows = np.stack([test for _, test in parts])
    return Data(stacked(train_input), stacked(train_target), stacked(test_input), np.stack(truth), rows)


def digits() -> tuple[Array, Array]:
    """Pixels in [0, 1], [rows, 64], and which digit each row is."""
    pixels, digit = load_digits(return_X_y=True)
    return pixels / 16, digit


@cache
def eights(seed: int = 0) -> Data:
    """An 8 or not: one row in ten is."""
    pixels, digit = digits()
    parts = folds(len(pixels), seed, digit)
    return assembled(parts, lambda train, test: (pixels[train], digit[train] == 8, pixels[test], digit[test] == 8))


@cache
def ten_digits(seed: int = 0) -> Data:
    """Which digit."""
    pixels, digit = digits()
    parts = folds(len(pixels), seed, digit)
    return assembled(parts, lambda train, test: (pixels[train], digit[train], pixels[test], digit[test]))


@cache
def scaled_digits(seed: int = 0) -> Data:
    """Pixels minus their mean, in standard deviations of all pixels, to be learnt as they are."""
    pixels, digit = digits()

    def fold(train: Array, test: Array) -> tuple[Array, Array, Array, Array]:
        mean = pixels[train].mean(0)
        scale = (pixels[train] - mean).std()
        seen, unseen = (pixels[train] - mean) / scale, (pixels[test] - mean) / scale
        return seen, seen, unseen, unseen

    return assembled(folds(len(pixels), seed, digit), fold)


@cache
def progression(seed: int = 0) -> Data:
    """Diabetes: progression after a year, in standard deviations from the mean."""
    features, target = load_diabetes(return_X_y=True)

    def fold(train: Array, test: Array) -> tuple[Array, Array, Array, Array]:
        scale, mean, deviation = features[train].std(0), target[train].mean(), target[train].std()
        seen, unseen = ((target[rows] - mean) / deviation for rows in (train, test))
        return features[train] / scale, seen, features[test] / scale, unseen

    return assembled(folds(len(features), seed), fold)


@cache
def benign_cells(seed: int = 0) -> Data:
    """Breast cancer: benign rows to learn from; held out are other benign rows and all malignant ones (the truth)."""
    features, benign = load_breast_cancer(return_X_y=True)
    malignant, benign = features[benign == 0], features[benign == 1]

    def fold(train: Array, test: Array) -> tuple[Array, Array, Array, Array]:
        mean, deviation = benign[train].mean(0), benign[train].std(0)
        seen = (benign[train] - mean) / deviation
        unseen = (np.concatenate([benign[test], malignant]) - mean) / deviation
        return seen, seen, unseen, np.arange(len(unseen)) >= len(test)

    return assembled(folds(len(benign), seed), fold)


def patches() -> Array:
    """Both photographs in grey, in [0, 1], cut into squares: [rows, 64]."""
    height, width = PATCHES
    grey = np.stack([load_sample_image(name)[: height * PATCH].mean(2) / 255 for name in PHOTOGRAPHS])
    cut: Array = grey.reshape(-1, height, PATCH, width, PATCH).swapaxes(2, 3).reshape(-1, PATCH * PATCH)
    return cut


def photographs(rows: Array) -> Array:
    """Patches put together again: [2, height, width]."""
    height, width = PATCHES
    whole: Array = rows.reshape(-1, height, width, PATCH, PATCH).swapaxes(2, 3)
    return whole.reshape(-1, height * PATCH, width * PATCH)


@cache
def noisy_patches(seed: int = 0) -> Data:
    """Clean patches to learn from (each batch gets fresh noise); held out are noisy patches, their truth clean."""
    clean = patches()
    noisy = clean + np.random.default_rng(seed).normal(0, NOISE, clean.shape)
    parts = folds(len(clean), seed)
    return assembled(parts, lambda train, test: (clean[train], clean[train], noisy[test], clean[test]))
