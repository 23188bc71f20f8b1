"""The six tasks: what each learns, where its threshold lies and why, and how it is scored on the rows held out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from sklearn.metrics import accuracy_score, average_precision_score, r2_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

import triton_thresh as tt

from . import data, formulas, models
from .data import Array, Data
from .models import Coded

Version: TypeAlias = Literal["pack", "plain", "formula"]
T = TypeVar("T")


def versions(
    settings: Mapping[str, Any], pack: Callable[..., T], formula: Callable[..., T], plain: Callable[..., T]
) -> dict[Version, Callable[..., T]]:
    return {"pack": partial(pack, **settings), "plain": plain, "formula": partial(formula, **settings)}


def same(make: Callable[..., T]) -> dict[Version, Callable[..., T]]:
    return {"pack": make, "plain": make, "formula": make}


def untouched(value: T) -> T:
    return value


@dataclass(frozen=True)
class Task:
    """`activation`, `loss` and `hook` have one entry per version; `secondary` is a figure beside the metric.

    `loss` takes what the model returns, and the target. `hook` is given the optimizer. `watch` is given the model, with the
    gradients of the step just made, and the held-out rows.
    """

    title: str
    op: str
    settings: Mapping[str, Any]
    why: str
    plain: str
    metric: str
    load: Callable[[int], Data]
    model: Callable[[nn.Module], nn.Module]
    activation: Mapping[Version, Callable[..., nn.Module]]
    loss: Mapping[Version, Callable[..., Tensor]]
    score: Callable[[Array, Array], float]  # (prediction, truth), a row per held-out row
    secondary_label: str
    secondary: Callable[[Any, Tensor], Tensor]  # (model, held-out rows): its mean
    secondary_format: str = "{:.1%}"
    hook: Mapping[Version, Callable[..., object]] = field(default_factory=lambda: same(untouched))
    predict: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)
    watch: Callable[[Any, Tensor], dict[str, float]] | None = None
    noise: float = 0.0
    learning_rate: float = 3e-3
    batch: int = 256


def squared_errors(model: nn.Module, input: Tensor) -> Tensor:
    return functional.mse_loss(model(input), input, reduction="none")


def mse_and_l0(output: Coded, target: Tensor, l0_weight: float) -> Tensor:
    return functional.mse_loss(output.reconstruction, target) + l0_weight * output.l0.mean()


def mse_and_l1(output: Coded, target: Tensor, l1_weight: float) -> Tensor:
    return functional.mse_loss(output.reconstruction, target) + l1_weight * output.code.sum(-1).mean()


def l0_and_variance(model: nn.Module, input: Tensor) -> dict[str, float]:
    output = model(input)
    unexplained = (output.reconstruction - input).square().sum() / (input - input.mean(0)).square().sum()
    return {"L0": float(output.l0.float().mean()), "R²": 1 - float(unexplained)}


def nonzero_gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]) != 0


def kept_by_layer(model: nn.Sequential, _: Tensor) -> dict[str, float]:
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return {
        f"{layer.in_features} → {layer.out_features}": float(nonzero_gradients(layer).float().mean())
        for layer in layers
    }


def average_precision(prediction: Array, truth: Array) -> float:
    return float(average_precision_score(truth, prediction))


def r_squared(prediction: Array, truth: Array) -> float:
    return float(r2_score(truth, prediction, multioutput="variance_weighted"))


def accuracy(prediction: Array, truth: Array) -> float:
    return float(accuracy_score(truth, prediction))


def roc_auc(prediction: Array, truth: Array) -> float:
    return float(roc_auc_score(truth, prediction))


def psnr(prediction: Array, truth: Array) -> float:
    return float(-10 * np.log10(np.square(prediction - truth).mean()))


EIGHTS: dict[str, Any] = {"threshold": 0.5, "weight_above": 1.0, "weight_below": 0.1, "pos_weight": torch.tensor(9.0)}
PROGRESSION = {"threshold": 1.0, "penalty_range": 0.5, "penalty_factor": 1.5}
CELLS = {"loss_threshold": 1.0, "penalty_factor": 2.0}
CODE = {"lambd": data.NOISE}
FEATURES = 512
JUMP = {"threshold": 0.1, "bandwidth": 0.1}
L0_WEIGHT, L1_WEIGHT = 3e-3, 3.3e-2  # for about the same number of features
GRADIENTS = {"threshold": 1e-3}

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
        model=partial(models.one_output, 64),
        loss=versions(
            EIGHTS,
            tt.threshold_bce_with_logits_loss,
            formulas.threshold_bce_with_logits_loss,
            partial(functional.binary_cross_entropy_with_logits, pos_weight=EIGHTS["pos_weight"]),
        ),
        activation=same(nn.ReLU),
        score=average_precision,
        secondary_label="rows with p ≥ 0.5",
        secondary=lambda model, x: torch.sigmoid(model(x)) >= EIGHTS["threshold"],
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
        model=partial(models.one_output, 10),
        loss=versions(PROGRESSION, tt.proximity_mse_loss, formulas.proximity_mse_loss, functional.mse_loss),
        activation=same(nn.SiLU),
        score=r_squared,
        secondary_label="predictions within 0.5 of the threshold",
        secondary=lambda model, x: (model(x) - PROGRESSION["threshold"]).abs() < PROGRESSION["penalty_range"],
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
        model=models.bottleneck,
        loss=versions(CELLS, tt.exceedance_mse_loss, formulas.exceedance_mse_loss, functional.mse_loss),
        activation=same(nn.Tanh),
        score=roc_auc,
        predict=lambda model, x: squared_errors(model, x).mean(1),
        secondary_label="squared errors above 1",
        secondary=lambda model, x: squared_errors(model, x) > CELLS["loss_threshold"],
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
        model=lambda activation: models.two_layers(64, 256, 64, activation),
        loss=same(functional.mse_loss),
        activation=versions(CODE, tt.nn.Hardshrink, formulas.Hardshrink, nn.ReLU),
        score=psnr,
        secondary_label="entries of the code set to 0",
        secondary=lambda model, x: model[:2](x) == 0,
        noise=data.NOISE,
    ),
    "autoencoder": Task(
        title="digits: sparse autoencoder",
        op="nn.JumpReLU.l0",
        settings=JUMP,
        why="each feature learns the threshold below which it stays silent, from the number of features it adds; "
        f"{FEATURES} features for 64 pixels",
        plain="ReLU, L1 penalty",
        metric="R²",
        load=data.scaled_digits,
        model=partial(models.SparseAutoencoder, 64, FEATURES),
        activation=versions({"num_features": FEATURES} | JUMP, tt.nn.JumpReLU, formulas.JumpReLU, models.CountedReLU),
        loss=same(partial(mse_and_l0, l0_weight=L0_WEIGHT)) | {"plain": partial(mse_and_l1, l1_weight=L1_WEIGHT)},
        score=r_squared,
        secondary_label="features of a row (L0)",
        secondary=lambda model, x: model(x).l0,
        secondary_format="{:.1f}",
        predict=lambda model, x: model(x).reconstruction,
        watch=l0_and_variance,
        batch=128,
    ),
    "gradients": Task(
        title="digits: thresholded gradients",
        op="GradientThreshold",
        settings=GRADIENTS,
        why="entries this small are set to 0 before each step, as if not worth sending to other devices; "
        "nothing is carried over to the next step",
        plain="all gradients",
        metric="accuracy",
        load=data.ten_digits,
        model=partial(models.three_layers, 64, 128, 10),
        activation=same(nn.ReLU),
        loss=same(functional.cross_entropy),
        hook=versions(GRADIENTS, tt.GradientThreshold, formulas.threshold_gradients, untouched),
        score=accuracy,
        secondary_label="gradients not 0, last step",
        secondary=lambda model, x: nonzero_gradients(model),
        predict=lambda model, x: model(x).argmax(1),
        watch=kept_by_layer,
    ),
}
