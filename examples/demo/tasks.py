"""The six tasks: what each learns, what its op is there for, and how that is measured on the rows held out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from sklearn.metrics import precision_score, r2_score, recall_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import triton_thresh as tt

from . import data, formulas, models
from .data import Array, Data
from .models import Coded

Settings: TypeAlias = dict[str, Any]  # numbers, given to pack and formula by name


@dataclass(frozen=True)
class Run:
    """One variant of a task, trained on every fold."""

    data: Data
    model: nn.Module
    losses: Array  # [steps]: means over the folds
    prediction: Array  # [folds, rows, ...]
    watched: Mapping[str, Array]  # [times, folds], what the task watches
    milliseconds: float  # a step's median


@dataclass(frozen=True)
class Measure:
    name: str
    of: Callable[[Run], Array]  # one value for each fold
    better: Literal["more", "less"]
    format: str = "{:.3f}"


@dataclass(frozen=True)
class Variant:
    """The parts in which variants of a task differ. `loss` takes what the model returns, and the target; `hook` the optimizer."""

    loss: Callable[[Any, Tensor], Tensor]
    activation: Callable[[int], nn.Module]  # of the number of folds
    hook: Callable[[Optimizer], object] = lambda optimizer: None


@dataclass(frozen=True)
class Task:
    """`watch` is given the model, with the gradients of the step just made, and the held-out rows."""

    title: str
    op: str
    settings: Settings
    purpose: str
    baseline_name: str
    load: Callable[[int], Data]
    network: Callable[[int, nn.Module], nn.Module]  # of the number of folds and the activation
    pack: Variant
    formula: Variant
    baseline: Variant
    measures: tuple[Measure, ...]  # what the op is there for, then what it may cost
    predict: Callable[[Any, Tensor], Tensor] = lambda model, rows: model(rows)
    watch: Callable[[Any, Tensor], dict[str, Tensor]] = lambda model, held_out: {}
    noise: float = 0.0  # standard deviation, added to the inputs of every batch
    learning_rate: float = 3e-3
    batch: int = 128


def plain(activation: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """An activation that has no parameters of its own for each fold."""
    return lambda folds: activation()


def by_fold(score: Callable[[Array, Array], float]) -> Callable[[Run], Array]:
    """A measure of (prediction, truth) of the held-out rows."""
    return lambda run: np.array([score(*fold) for fold in zip(run.prediction, run.data.test_truth)])


# ------------------------------------------------------------------------------------------------------------ classifier
EIGHTS: Settings = {"threshold": 0.5, "weight_above": 1.0, "weight_below": 0.1}


def recall(logit: Array, eight: Array) -> float:
    return float(recall_score(eight, logit >= 0, zero_division=0.0))


def precision(logit: Array, eight: Array) -> float:
    return float(precision_score(eight, logit >= 0, zero_division=0.0))


CLASSIFIER = Task(
    title="digits: an 8 or not",
    op="threshold_bce_with_logits_loss",
    settings=EIGHTS,
    purpose="What the model flags (p ≥ 0.5) counts ten times what it rejects. One digit in ten is an 8, so nearly all that is "
    "rejected are easy rows. A missed 8 counts a tenth, too: the weight looks at the prediction alone.",
    baseline_name="plain BCE",
    load=data.eights,
    network=partial(models.OneOutput, (64, 16, 1)),
    pack=Variant(partial(tt.threshold_bce_with_logits_loss, **EIGHTS), plain(nn.ReLU)),
    formula=Variant(partial(formulas.threshold_bce_with_logits_loss, **EIGHTS), plain(nn.ReLU)),
    baseline=Variant(functional.binary_cross_entropy_with_logits, plain(nn.ReLU)),
    measures=(
        Measure("recall at p ≥ 0.5", by_fold(recall), "more"),
        Measure("precision at p ≥ 0.5", by_fold(precision), "more"),
    ),
    learning_rate=1e-2,
)

# ------------------------------------------------------------------------------------------------------------- regressor
LIMIT: Settings = {"threshold": 0.0, "penalty_range": 0.5, "penalty_factor": 0.75}


def near_limit(prediction: Array, truth: Array) -> float:
    return float((np.abs(prediction - LIMIT["threshold"]) < LIMIT["penalty_range"]).mean())


def r_squared(prediction: Array, truth: Array) -> float:
    return float(r2_score(truth, prediction, multioutput="variance_weighted"))


REGRESSOR = Task(
    title="diabetes: progression after a year",
    op="proximity_mse_loss",
    settings=LIMIT,
    purpose="The mean stands for a limit at which treatment changes. An error costs up to 1.75 times as much where the "
    "prediction lies within half a standard deviation of it, so fewer predictions leave the decision open.",
    baseline_name="MSE",
    load=data.progression,
    network=partial(models.OneOutput, (10, 16, 1)),
    pack=Variant(partial(tt.proximity_mse_loss, **LIMIT), plain(nn.SiLU)),
    formula=Variant(partial(formulas.proximity_mse_loss, **LIMIT), plain(nn.SiLU)),
    baseline=Variant(functional.mse_loss, plain(nn.SiLU)),
    measures=(
        Measure("share near the limit", by_fold(near_limit), "less"),
        Measure("R²", by_fold(r_squared), "more"),
    ),
    learning_rate=1e-3,
)

# -------------------------------------------------------------------------------------------------------------- detector
CELLS: Settings = {"loss_threshold": 1.0, "penalty_factor": 10.0}


def squared_errors(model: nn.Module, input: Tensor) -> Tensor:
    return functional.mse_loss(model(input), input, reduction="none")


def roc_auc(errors: Array, malignant: Array) -> float:
    return float(roc_auc_score(malignant, errors.mean(1)))


DETECTOR = Task(
    title="breast cancer: an autoencoder of benign cells",
    op="exceedance_mse_loss",
    settings=CELLS,
    purpose="A row that is copied badly is suspicious. Features are in standard deviations; one that is missed by more than 1 "
    "counts ten times, since one such miss makes a benign row look malignant.",
    baseline_name="MSE",
    load=data.benign_cells,
    network=partial(models.Perceptron, (30, 16, 4, 16, 30)),
    pack=Variant(partial(tt.exceedance_mse_loss, **CELLS), plain(nn.Tanh)),
    formula=Variant(partial(formulas.exceedance_mse_loss, **CELLS), plain(nn.Tanh)),
    baseline=Variant(functional.mse_loss, plain(nn.Tanh)),
    measures=(
        Measure("ROC-AUC", by_fold(roc_auc), "more"),
        Measure("MSE of benign rows", by_fold(lambda errors, malignant: errors[~malignant].mean()), "less"),
    ),
    predict=squared_errors,
)

# -------------------------------------------------------------------------------------------------------------- denoiser
PIXELS = data.PATCH**2


def psnr(prediction: Array, truth: Array) -> float:
    return float(-10 * np.log10(np.square(prediction - truth).mean()))


DENOISER = Task(
    title="photographs under noise: a learned transform",
    op="softshrink",
    settings={"lambd": data.NOISE},
    purpose="Between a transform and its inverse, both learned, what lies below a threshold is noise. Each coefficient learns "
    "its own threshold; all start at the noise's standard deviation.",
    baseline_name="ReLU",
    load=data.noisy_patches,
    network=partial(models.Denoiser, PIXELS),
    pack=Variant(functional.mse_loss, partial(models.LearnedShrinkage, tt.softshrink, PIXELS, data.NOISE)),
    formula=Variant(functional.mse_loss, partial(models.LearnedShrinkage, formulas.softshrink, PIXELS, data.NOISE)),
    baseline=Variant(functional.mse_loss, plain(nn.ReLU)),
    measures=(Measure("PSNR, dB", by_fold(psnr), "more", "{:.2f}"),),
    noise=data.NOISE,
    batch=64,
)

# ----------------------------------------------------------------------------------------------------------- autoencoder
FEATURES = 96
JUMP: Settings = {"threshold": 0.3, "bandwidth": 0.3}
L0_WEIGHT, L1_WEIGHT = 0.4, 1.22  # for about the same number of features a row


def error_and_l0(output: Coded, target: Tensor, weight: float = L0_WEIGHT) -> Tensor:
    return ((output.reconstruction - target).square().sum(-1) + weight * output.l0).mean()


def error_and_l1(output: Coded, target: Tensor, weight: float = L1_WEIGHT) -> Tensor:
    return ((output.reconstruction - target).square().sum(-1) + weight * output.code.sum(-1)).mean()


def features_and_r2(model: nn.Module, held_out: Tensor) -> dict[str, Tensor]:
    output = model(held_out)
    unexplained = (output.reconstruction - held_out).square().sum((1, 2))
    return {
        "L0": output.l0.float().mean(1),
        "R²": 1 - unexplained / (held_out - held_out.mean(1, keepdim=True)).square().sum((1, 2)),
    }


AUTOENCODER = Task(
    title="digits: a sparse autoencoder",
    op="nn.JumpReLU.l0",
    settings=JUMP,
    purpose=f"Each of {FEATURES} features learns the threshold below which it is silent, from the number of features that a row "
    "uses. The baseline pays for the size of features instead; its penalty is set for about the same number.",
    baseline_name="ReLU + L1",
    load=data.scaled_digits,
    network=partial(models.SparseAutoencoder, 64, FEATURES),
    pack=Variant(error_and_l0, lambda folds: tt.nn.JumpReLU((folds, 1, FEATURES), **JUMP)),
    formula=Variant(error_and_l0, lambda folds: formulas.JumpReLU((folds, 1, FEATURES), **JUMP)),
    baseline=Variant(error_and_l1, plain(models.CountedReLU)),
    measures=(
        Measure("R²", by_fold(r_squared), "more"),
        Measure("features of a row", lambda run: run.watched["L0"][-1], "less", "{:.1f}"),
    ),
    predict=lambda model, rows: model(rows).reconstruction,
    watch=features_and_r2,
    learning_rate=6e-3,
    batch=64,
)

# ------------------------------------------------------------------------------------------------------------- gradients
GRADIENTS: Settings = {"threshold": 1e-3}
ALL_LAYERS = "all layers"


def cross_entropy(logits: Tensor, digit: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), digit.flatten())


def gradients_not_0(model: models.Perceptron, held_out: Tensor) -> dict[str, Tensor]:
    """The shares of each layer's weights, and of all parameters."""
    weights = {f"layer {nth}": w.grad.ne(0).float().mean((1, 2)) for nth, w in enumerate(model.weights, 1)}
    every = torch.cat([p.grad.flatten(1) for p in model.parameters() if p.grad is not None], 1)
    return weights | {ALL_LAYERS: every.ne(0).float().mean(1)}


ALL_DIGITS = Task(
    title="digits: the larger gradients alone",
    op="GradientThreshold",
    settings=GRADIENTS,
    purpose="Entries of the gradient up to 0.001 are set to 0 before each step, as if not worth sending to other devices. "
    "Nothing is carried over to the next step.",
    baseline_name="all gradients",
    load=data.ten_digits,
    network=partial(models.Perceptron, (64, 64, 64, 10)),
    pack=Variant(cross_entropy, plain(nn.ReLU), partial(tt.GradientThreshold, **GRADIENTS)),
    formula=Variant(cross_entropy, plain(nn.ReLU), partial(formulas.threshold_gradients, **GRADIENTS)),
    baseline=Variant(cross_entropy, plain(nn.ReLU)),
    measures=(
        Measure("gradients not 0", lambda run: run.watched[ALL_LAYERS].mean(0), "less"),
        Measure("accuracy", by_fold(lambda logits, digit: (logits.argmax(1) == digit).mean()), "more"),
    ),
    watch=gradients_not_0,
)

TASKS = {
    "classifier": CLASSIFIER,
    "regressor": REGRESSOR,
    "detector": DETECTOR,
    "denoiser": DENOISER,
    "autoencoder": AUTOENCODER,
    "gradients": ALL_DIGITS,
}
