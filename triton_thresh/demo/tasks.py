"""The four tasks: what each learns, where its threshold lies and why, and how it is scored on the rows held out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

import triton_thresh as tt

from . import data, formulas
from .data import Array, Data

Version: TypeAlias = Literal["pack", "plain", "formula"]
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """`loss` and `activation` have one entry per version; `share` marks what the threshold singles out."""

    title: str
    op: str
    settings: Mapping[str, Any]
    why: str
    plain: str
    metric: str
    load: Callable[[int], Data]
    model: Callable[[nn.Module], nn.Sequential]
    loss: Mapping[Version, Callable[..., Tensor]]
    activation: Mapping[Version, Callable[..., nn.Module]]
    score: Callable[[Array, Array], float]  # (prediction, truth), a row per held-out row
    share_label: str
    share: Callable[[nn.Sequential, Tensor], Tensor]
    predict: Callable[[nn.Sequential, Tensor], Tensor] = lambda model, x: model(x)
    noise: float = 0.0
    learning_rate: float = 3e-3
    batch: int = 256


def versions(
    settings: Mapping[str, Any], pack: Callable[..., T], formula: Callable[..., T], plain: Callable[..., T]
) -> dict[Version, Callable[..., T]]:
    return {"pack": partial(pack, **settings), "plain": plain, "formula": partial(formula, **settings)}


def same(make: Callable[..., T]) -> dict[Version, Callable[..., T]]:
    return {"pack": make, "plain": make, "formula": make}


def two_layers(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


def one_output(inputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(*two_layers(inputs, 16, 1, activation), nn.Flatten(0))


def bottleneck(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(*two_layers(30, 16, 4, activation), *two_layers(4, 16, 30, activation))


def squared_errors(model: nn.Sequential, input: Tensor) -> Tensor:
    return functional.mse_loss(model(input), input, reduction="none")


def average_precision(prediction: Array, truth: Array) -> float:
    return float(average_precision_score(truth, prediction))


def r_squared(prediction: Array, truth: Array) -> float:
    return float(r2_score(truth, prediction))


def roc_auc(prediction: Array, truth: Array) -> float:
    return float(roc_auc_score(truth, prediction))


def psnr(prediction: Array, truth: Array) -> float:
    return float(-10 * np.log10(np.square(prediction - truth).mean()))


EIGHTS: dict[str, Any] = {"threshold": 0.5, "weight_above": 1.0, "weight_below": 0.1, "pos_weight": torch.tensor(9.0)}
PROGRESSION = {"threshold": 1.0, "penalty_range": 0.5, "penalty_factor": 1.5}
CELLS = {"loss_threshold": 1.0, "penalty_factor": 2.0}
CODE = {"lambd": data.NOISE}

TASKS = {
    "classifier": Task(
        title="digits: an 8 or not",
        op="threshold_bce_with_logits_loss",
        settings=EIGHTS,
        why="one digit in ten is an 8, so an 8 weighs nine times, which puts the balanced cut at p = 0.5; "
        "what is rejected counts a tenth, so that the many easy rows do not outweigh the doubtful ones",
        plain="BCE, same pos_weight",
        metric="average precision",
        load=data.eights,
        model=partial(one_output, 64),
        loss=versions(
            EIGHTS,
            tt.threshold_bce_with_logits_loss,
            formulas.threshold_bce_with_logits_loss,
            partial(functional.binary_cross_entropy_with_logits, pos_weight=EIGHTS["pos_weight"]),
        ),
        activation=same(nn.ReLU),
        score=average_precision,
        share_label="rows with p ≥ 0.5",
        share=lambda model, x: torch.sigmoid(model(x)) >= EIGHTS["threshold"],
    ),
    "regressor": Task(
        title="diabetes: progression after a year",
        op="proximity_mse_loss",
        settings=PROGRESSION,
        why="one standard deviation above the mean stands for the line where treatment changes: "
        "a prediction within half a deviation of it pays up to 2.5 times for its error",
        plain="MSE",
        metric="R²",
        load=data.progression,
        model=partial(one_output, 10),
        loss=versions(PROGRESSION, tt.proximity_mse_loss, formulas.proximity_mse_loss, functional.mse_loss),
        activation=same(nn.SiLU),
        score=r_squared,
        share_label="predictions within 0.5 of the threshold",
        share=lambda model, x: (model(x) - PROGRESSION["threshold"]).abs() < PROGRESSION["penalty_range"],
        learning_rate=1e-3,
    ),
    "detector": Task(
        title="breast cancer: learns benign cells",
        op="exceedance_mse_loss",
        settings=CELLS,
        why="features are in standard deviations of the benign rows: one missed by more than 1 counts twice, "
        "since a benign row with such misses is a false alarm",
        plain="MSE",
        metric="ROC-AUC",
        load=data.benign_cells,
        model=bottleneck,
        loss=versions(CELLS, tt.exceedance_mse_loss, formulas.exceedance_mse_loss, functional.mse_loss),
        activation=same(nn.Tanh),
        score=roc_auc,
        predict=lambda model, x: squared_errors(model, x).mean(1),
        share_label="squared errors above 1",
        share=lambda model, x: squared_errors(model, x) > CELLS["loss_threshold"],
    ),
    "denoiser": Task(
        title="digits under noise: sparse code",
        op="nn.Hardshrink",
        settings=CODE,
        why="the threshold is the noise's standard deviation: "
        "what is smaller in the code is taken for noise and set to 0",
        plain="ReLU instead",
        metric="PSNR, dB",
        load=data.noisy_digits,
        model=lambda activation: two_layers(64, 256, 64, activation),
        loss=same(functional.mse_loss),
        activation=versions(CODE, tt.nn.Hardshrink, formulas.Hardshrink, nn.ReLU),
        score=psnr,
        share_label="entries of the code set to 0",
        share=lambda model, x: model[:2](x) == 0,
        noise=data.NOISE,
    ),
}
