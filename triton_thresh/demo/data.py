"""Three data sets bundled with scikit-learn, split into rows to learn from and rows held out."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Array: TypeAlias = NDArray[Any]

HELD_OUT = 0.3
NOISE = 0.3  # standard deviation, on pixels in [0, 1]


@dataclass(frozen=True)
class Data:
    """Inputs are [rows, features]; train_target has what the loss wants, test_truth one entry per row."""

    train_input: Tensor
    train_target: Tensor
    test_input: Tensor
    test_truth: Array


def tensor(array: Array) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32)


def digits(seed: int) -> tuple[Array, Array, Array, Array]:
    pixels, digit = load_digits(return_X_y=True)
    train, test, train_digit, test_digit = train_test_split(
        pixels / 16, digit, test_size=HELD_OUT, random_state=seed, stratify=digit
    )
    return train, test, train_digit, test_digit


def eights(seed: int) -> Data:
    """An 8 or not: one row in ten is."""
    train, test, train_digit, test_digit = digits(seed)
    return Data(tensor(train), tensor(train_digit == 8), tensor(test), test_digit == 8)


def ten_digits(seed: int) -> Data:
    """Which digit."""
    train, test, train_digit, test_digit = digits(seed)
    return Data(tensor(train), torch.as_tensor(train_digit), tensor(test), test_digit)


def scaled_digits(seed: int) -> Data:
    """Pixels minus their mean, in standard deviations of all pixels, to be learnt as they are."""
    train, test, _, _ = digits(seed)
    mean = train.mean(0)
    scale = (train - mean).std()
    train, test = (train - mean) / scale, (test - mean) / scale
    return Data(tensor(train), tensor(train), tensor(test), test)


def noisy_digits(seed: int) -> Data:
    """Clean rows to learn from (each batch gets fresh noise); held out are noisy rows, their truth clean."""
    train, test, _, _ = digits(seed)
    noise = np.random.default_rng(seed).normal(0, NOISE, test.shape)
    return Data(tensor(train), tensor(train), tensor(test + noise), test)


def progression(seed: int) -> Data:
    """Diabetes: progression after a year, in standard deviations from the mean."""
    features, target = load_diabetes(return_X_y=True)
    train, test, train_y, test_y = train_test_split(features, target, test_size=HELD_OUT, random_state=seed)
    scale, mean, deviation = train.std(0), train_y.mean(), train_y.std()
    return Data(
        tensor(train / scale), tensor((train_y - mean) / deviation), tensor(test / scale), (test_y - mean) / deviation
    )


def benign_cells(seed: int) -> Data:
    """Breast cancer: benign rows to learn from; held out are other benign rows and all malignant ones (the truth)."""
    features, benign = load_breast_cancer(return_X_y=True)
    train, unseen = train_test_split(features[benign == 1], test_size=HELD_OUT, random_state=seed)
    mean, deviation = train.mean(0), train.std(0)
    test = np.concatenate([unseen, features[benign == 0]])
    rows = tensor((train - mean) / deviation)
    return Data(rows, rows, tensor((test - mean) / deviation), np.arange(len(test)) >= len(unseen))
