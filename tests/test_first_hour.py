"""What goes wrong in a user's first hour, from every public entry: the error names the argument, what it was, what would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import triton_thresh as tt
from triton_thresh.checks import OutOfRange

from .conftest import INTERPRETED
from .rows import GATES

X, Y = torch.rand(2, 3), torch.rand(2, 3)
ELSEWHERE = torch.rand(2, 3, device="meta")
INTEGERS = torch.arange(6).reshape(2, 3)
PARAMETER = nn.Parameter(torch.tensor(0.5))
LAYER = nn.Linear(3, 2)
OPTIMIZER = torch.optim.SGD(LAYER.parameters(), lr=0.1)
FLOATS = "float16, bfloat16, float32, float64"
NUMBER = "must be a number or a tensor"
REDUCTIONS = "reduction must be one of 'mean', 'sum', 'none'"
RULES = "ByPrediction, ByOutcome, ByConfidence, ByProximity, ByLoss, ByRank"
BASES = "an instance of BCE, BCEWithLogits, MSE, Focal, Asymmetric, Huber, EpsilonInsensitive, Quantile, Hinge"
BACKENDS = "name must be one of 'auto', 'triton', 'eager'"


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x - y) ** 2


pytestmark = pytest.mark.skipif(INTERPRETED, reason="without Triton's interpreter")


class Mistake(NamedTuple):
    """A call, and the words of its error."""

    call: Callable[[], object]
    error: type[Exception]
    words: tuple[str, ...]


def mistake(call: Callable[[], object], error: type[Exception], *words: str) -> Mistake:
    return Mistake(call, error, words)


def of_a_gate(name: str, threshold: str, *rest: float, learns: bool = False) -> list[Mistake]:
    """The mistakes that every gate shares; `rest` are the operands after its first."""

    def op(input: Any, threshold: Any) -> Any:
        return getattr(tt, name)(input, threshold, *rest)

    found = [
        mistake(lambda: op([0.1, 0.2], 0.5), TypeError, name, "input must be a tensor, got list"),
        mistake(lambda: op(X.numpy(), 0.5), TypeError, name, "input must be a tensor, got ndarray"),
        mistake(lambda: op(X.bool(), 0.5), TypeError, name, "input has dtype torch.bool", FLOATS),
        mistake(lambda: op(X, "0.5"), TypeError, name, threshold, NUMBER, "str '0.5'"),
        mistake(lambda: op(X, np.ones(3)), TypeError, name, threshold, NUMBER, "ndarray"),
        mistake(lambda: op(X, [0.1, 0.2, 0.3]), TypeError, name, threshold, NUMBER, "list"),
        mistake(lambda: op(X, torch.ones(2)), ValueError, name, threshold, "(2,)", "broadcast", "(2, 3)"),
        mistake(lambda: op(X, X.amax(1)), ValueError, name, "(2, 1) does, which keepdim=True or unsqueeze(1) gives"),
        mistake(lambda: op(X, ELSEWHERE), RuntimeError, name, f"{threshold} is on meta", "expected cpu"),
    ]
    if not learns:
        found.append(mistake(lambda: op(X, PARAMETER), ValueError, name, f"{threshold} requires grad", "detach()"))
    return found


def forced(call: Callable[[], object]) -> Callable[[], object]:
    def under_triton() -> object:
        with tt.use_backend("triton"):
            return call()

    return under_triton


def entered(name: Any) -> Callable[[], object]:
    def enter() -> object:
        with tt.use_backend(name):
            return None

    return enter


def of_a_loss(name: str, call: Callable[..., Tensor], setting: str) -> list[Mistake]:
    """The mistakes that every loss shares; `call` takes input, target and keywords."""
    differ = "target has shape (1, 3), expected the input's shape (2, 3)"
    return [
        mistake(lambda: call(INTEGERS, Y), TypeError, name, "input has dtype torch.int64", FLOATS),
        mistake(lambda: call([0.1], Y), TypeError, name, "input must be a tensor, got list"),
        mistake(lambda: call(X, 1.0), TypeError, name, "target must be a tensor, got float 1.0"),
        mistake(lambda: call(X, [1.0]), TypeError, name, "target must be a tensor, got list"),
        mistake(lambda: call(X, Y[:1]), ValueError, name, differ, "no broadcasting"),
        mistake(lambda: call(X, ELSEWHERE), RuntimeError, name, "target is on meta", "expected cpu"),
        mistake(lambda: call(X, Y, reduction="avg"), ValueError, name, REDUCTIONS, "'avg'"),
        mistake(lambda: call(X, Y, weight=[1.0]), TypeError, name, "weight", NUMBER, "list"),
        mistake(lambda: call(X, Y, weight=torch.ones(2)), ValueError, name, "weight", "(2,)", "broadcast", "(2, 3)"),
        mistake(lambda: call(X, Y, **{setting: "1"}), TypeError, name, setting, NUMBER, "str '1'"),
        mistake(lambda: call(X, Y, **{setting: PARAMETER}), ValueError, name, f"{setting} requires grad", "'none'"),
    ]


def of_a_bandwidth(op: Any, name: str) -> list[Mistake]:
    return [
        mistake(lambda: op(0.0), ValueError, name, "bandwidth must be a finite number above 0, got 0.0"),
        mistake(lambda: op(-0.1), ValueError, name, "bandwidth must be a finite number above 0, got -0.1"),
        mistake(lambda: op("0.1"), TypeError, name, "bandwidth must be a number, got str '0.1'"),
    ]


def named(name: str, **needs: Any) -> Callable[..., Tensor]:
    return lambda x, y, **keywords: getattr(tt, name)(x, y, **{**needs, **keywords})


def module(name: str, **needs: Any) -> Callable[..., Tensor]:
    return lambda x, y, **keywords: getattr(tt.nn, name)(**{**needs, **keywords})(x, y)


def of_a_rule(rule: Any, setting: str, base: Any = "mse") -> list[Mistake]:
    def call(**settings: Any) -> Tensor:
        return tt.threshold_loss(X, Y, rule(**settings), base=base)

    needs = {"threshold": 0.5} if rule is tt.ByProximity else {}
    return [
        mistake(lambda: call(**{**needs, setting: "1"}), TypeError, setting, NUMBER, "str '1'"),
        mistake(lambda: call(**{**needs, setting: torch.ones(2)}), ValueError, setting, "(2,)", "broadcast", "(2, 3)"),
        mistake(lambda: call(**{**needs, setting: PARAMETER}), ValueError, f"{setting} requires grad"),
        mistake(lambda: rule(**needs, factor=2.0), TypeError, "factor"),
    ]


def of_a_base(base: Any, setting: str) -> list[Mistake]:
    def call(value: Any) -> Tensor:
        return tt.threshold_loss(X, Y, base=base(**{setting: value}))

    return [
        mistake(lambda: call("1"), TypeError, setting, "must be a number", "str '1'"),
        mistake(lambda: call(torch.ones(2)), ValueError, setting, "(2,)", "broadcast", "(2, 3)"),
        mistake(lambda: call(PARAMETER), ValueError, f"{setting} requires grad"),
        mistake(lambda: call(ELSEWHERE), RuntimeError, f"{setting} is on meta", "expected cpu"),
        mistake(lambda: base(factor=2.0), TypeError, "factor"),
    ]


def of_a_bare_base(base: Any) -> list[Mistake]:
    return [
        mistake(lambda: base(0.5), TypeError, "argument"),
        mistake(lambda: tt.threshold_loss(X, Y, base=base), ValueError, f"base must be one of {STRINGS}", BASES),
        mistake(lambda: tt.threshold_loss(X, Y, base()), TypeError, "rule must be None or one of", RULES),
    ]


STRINGS = "'bce', 'bce_with_logits', 'mse'"
NAMED = {
    "threshold_bce_loss": (named("threshold_bce_loss"), "threshold"),
    "threshold_bce_with_logits_loss": (named("threshold_bce_with_logits_loss"), "pos_weight"),
    "threshold_mse_loss": (named("threshold_mse_loss", threshold=0.5), "weight_below"),
    "proximity_mse_loss": (named("proximity_mse_loss", threshold=0.5), "penalty_range"),
    "exceedance_mse_loss": (named("exceedance_mse_loss"), "penalty_factor"),
    "threshold_loss": (named("threshold_loss", rule=tt.ByLoss()), "pos_weight"),
    "sigmoid_focal_loss": (named("sigmoid_focal_loss"), "alpha"),
    "asymmetric_loss": (named("asymmetric_loss"), "gamma_neg"),
}
MODULES = {
    "ThresholdBCELoss": ("threshold_bce_loss", module("ThresholdBCELoss"), "threshold"),
    "ThresholdBCEWithLogitsLoss": (
        "threshold_bce_with_logits_loss",
        module("ThresholdBCEWithLogitsLoss"),
        "pos_weight",
    ),
    "ThresholdMSELoss": ("threshold_mse_loss", module("ThresholdMSELoss", threshold=0.5), "weight_above"),
    "ProximityMSELoss": ("proximity_mse_loss", module("ProximityMSELoss", threshold=0.5), "penalty_factor"),
    "ExceedanceMSELoss": ("exceedance_mse_loss", module("ExceedanceMSELoss"), "loss_threshold"),
    "SigmoidFocalLoss": ("sigmoid_focal_loss", module("SigmoidFocalLoss"), "gamma"),
    "AsymmetricLoss": ("asymmetric_loss", module("AsymmetricLoss"), "clip"),
    "ThresholdLoss": ("threshold_loss", module("ThresholdLoss"), "weight"),
}
MANY = "threshold must be a number, a tensor, or a list with a number for each parameter"
HALF = X.half()

MISTAKES: dict[str, list[Mistake]] = {
    "threshold": [
        *of_a_gate("threshold", "threshold"),
        mistake(lambda: tt.threshold(X, 0.5, Y), TypeError, "value must be a number", "(2, 3)"),  # type: ignore[arg-type]
        mistake(lambda: tt.threshold(HALF, 0.5, 1e6), RuntimeError, "value is 1000000.0", "float16", "65504"),
        mistake(lambda: tt.threshold(PARAMETER, 0.5, inplace=True), RuntimeError, "leaf", "requires grad", "input"),
        mistake(lambda: tt.threshold(X.expand(2, 2, 3), 0.5, inplace=True), RuntimeError, "share memory", "clone()"),
        mistake(lambda: tt.threshold(X), TypeError, "'threshold'"),  # type: ignore[call-arg]
    ],
    "hardshrink": [
        *of_a_gate("hardshrink", "lambd"),
        mistake(lambda: tt.hardshrink(INTEGERS), TypeError, "hardshrink", "input has dtype torch.int64", FLOATS),
        mistake(lambda: tt.hardshrink(PARAMETER, inplace=True), RuntimeError, "leaf", "requires grad", "input"),
        mistake(forced(lambda: tt.hardshrink(X)), RuntimeError, "triton", "auto"),
    ],
    "softshrink": [
        *of_a_gate("softshrink", "lambd", learns=True),
        mistake(lambda: tt.softshrink(X, -0.5), OutOfRange, "softshrink", "lambd must be at least 0, got -0.5"),
    ],
    "firm": [
        *of_a_gate("firm", "low", 1.0),
        mistake(lambda: tt.firm(X, 0.5, "1"), TypeError, "firm: high", NUMBER, "str '1'"),  # type: ignore[arg-type]
        mistake(lambda: tt.firm(X, 0.5, torch.ones(2)), ValueError, "firm: high", "(2,)", "broadcast", "(2, 3)"),
        mistake(lambda: tt.firm(X, 0.5, PARAMETER), ValueError, "firm: high requires grad", "detach()"),
        mistake(lambda: tt.firm(X, -0.5, 1.0), OutOfRange, "firm: low must be at least 0, got -0.5"),
        mistake(lambda: tt.firm(X, 1.0, 0.5), OutOfRange, "firm: high must be at least 1.0, got 0.5"),
        mistake(lambda: tt.firm(X, 0.5), TypeError, "'high'"),  # type: ignore[call-arg]
    ],
    "binary_threshold": [
        *of_a_gate("binary_threshold", "threshold"),
        mistake(lambda: tt.binary_threshold(X, 0.5, dtype="bool"), TypeError, "dtype is 'bool'", "float16"),  # type: ignore[arg-type]
        mistake(lambda: tt.binary_threshold(X, 0.5, 300, dtype=torch.uint8), RuntimeError, "above_value is 300", "255"),
    ],
    "jumprelu": [
        *of_a_gate("jumprelu", "threshold", learns=True),
        *of_a_bandwidth(lambda bandwidth: tt.jumprelu(X, 0.5, bandwidth), "jumprelu"),
    ],
    "step": [
        *of_a_gate("step", "threshold", learns=True),
        *of_a_bandwidth(lambda bandwidth: tt.step(X, 0.5, bandwidth), "step"),
    ],
    "jumprelu_l0": [
        *of_a_gate("jumprelu_l0", "threshold", learns=True),
        *of_a_bandwidth(lambda bandwidth: tt.jumprelu_l0(X, 0.5, bandwidth), "jumprelu_l0"),
        mistake(lambda: tt.jumprelu_l0(X[0, 0], 0.5), ValueError, "input has shape ()", "at least one dimension"),
    ],
    **{name: of_a_loss(name, call, setting) for name, (call, setting) in NAMED.items()},
    **{name: of_a_loss(op, call, setting) for name, (op, call, setting) in MODULES.items()},
    "ByPrediction": of_a_rule(tt.ByPrediction, "weight_above"),
    "ByOutcome": of_a_rule(tt.ByOutcome, "false_negative"),
    "ByProximity": of_a_rule(tt.ByProximity, "penalty_range"),
    "ByLoss": of_a_rule(tt.ByLoss, "loss_threshold"),
    "ByConfidence": [
        *of_a_rule(tt.ByConfidence, "gamma", "bce"),
        mistake(
            lambda: tt.ByConfidence(0.0), ValueError, "ByConfidence: threshold must be above 0 and at most 1, got 0"
        ),
        mistake(
            lambda: tt.threshold_loss(X, Y, tt.ByConfidence(), base="mse"),
            ValueError,
            "ByConfidence",
            "logits",
            "MSE()",
        ),
    ],
    "ByRank": [
        mistake(lambda: tt.ByRank("1"), TypeError, "ByRank: keep must be an int or a float", "'1'"),  # type: ignore[arg-type]
        mistake(lambda: tt.ByRank(1.5), ValueError, "ByRank: keep must be an int above 0, or a float", "1.5"),
        mistake(lambda: tt.ByRank(min_kept=-1), ValueError, "ByRank: min_kept must be 0 or more, got -1"),
    ],
    "LossStats": [
        mistake(
            lambda: tt.threshold_loss(X, Y, base="mse", return_stats=True), ValueError, "return_stats", "ByPrediction"
        ),
    ],
    "Focal": [
        *of_a_base(tt.Focal, "gamma"),
        mistake(lambda: tt.Focal(1.5), ValueError, "Focal: alpha must be a number from 0 to 1; None or -1", "1.5"),
        mistake(
            lambda: tt.Focal(gamma=-1.0), ValueError, "Focal: gamma must be a finite number of 0 or more, got -1.0"
        ),
    ],
    "Asymmetric": [
        *of_a_base(tt.Asymmetric, "clip"),
        mistake(lambda: tt.Asymmetric(-1.0), ValueError, "Asymmetric: gamma_neg must be a finite number of 0 or more"),
    ],
    "EpsilonInsensitive": [
        *of_a_base(tt.EpsilonInsensitive, "epsilon"),
        mistake(lambda: tt.EpsilonInsensitive(-0.1), ValueError, "EpsilonInsensitive: epsilon", "0 or more, got -0.1"),
    ],
    "Quantile": [
        *of_a_base(tt.Quantile, "q"),
        mistake(lambda: tt.Quantile(90), ValueError, "Quantile: q must be a number from 0 to 1, got 90"),
    ],
    "Hinge": of_a_base(tt.Hinge, "margin"),
    "BCE": of_a_bare_base(tt.BCE),
    "MSE": of_a_bare_base(tt.MSE),
    "BCEWithLogits": [
        *of_a_base(tt.BCEWithLogits, "pos_weight"),
        mistake(
            lambda: tt.threshold_loss(X, Y, base=tt.BCEWithLogits(), pos_weight=2.0),
            ValueError,
            "pos_weight goes with the string 'bce_with_logits'",
            "BCEWithLogits(pos_weight=...)",
        ),
    ],
    "Huber": [
        *of_a_base(tt.Huber, "delta"),
        mistake(lambda: tt.Huber(0.0), ValueError, "Huber: delta must be a finite number above 0, got 0.0"),
        mistake(lambda: tt.Huber(-1.0), ValueError, "Huber: delta must be a finite number above 0, got -1.0"),
        mistake(lambda: tt.threshold_loss(X, Y, base="huber"), ValueError, STRINGS, BASES, "'huber'"),  # type: ignore[arg-type]
    ],
    "topk_threshold": [
        mistake(lambda: tt.topk_threshold(X), ValueError, "topk_threshold: expected exactly one of k and fraction"),
        mistake(lambda: tt.topk_threshold(X, 0.1), TypeError, "k must be an int, got float 0.1", "fraction="),  # type: ignore[arg-type]
        mistake(lambda: tt.topk_threshold(X, 7), ValueError, "k must be 1 to 6, the number of elements, got 7"),
        mistake(lambda: tt.topk_threshold(X, 1, 0), ValueError, "dim must be None or -1, got 0"),
    ],
    "quantile_threshold": [
        mistake(lambda: tt.quantile_threshold(X, 90), ValueError, "quantile_threshold: q must be 0 to 1, got 90"),
        mistake(lambda: tt.quantile_threshold(X[:0], 0.5), ValueError, "shape (0, 3)", "at least one element"),
    ],
    "otsu_threshold": [
        mistake(lambda: tt.otsu_threshold(X.numpy()), TypeError, "otsu_threshold: input must be a tensor, got ndarray"),  # type: ignore[arg-type]
        mistake(lambda: tt.otsu_threshold(X, 1), ValueError, "otsu_threshold: bins must be 2 or more, got 1"),
        mistake(lambda: tt.otsu_threshold(INTEGERS), TypeError, "input has dtype torch.int64", FLOATS),
    ],
    "batch_topk": [
        mistake(lambda: tt.batch_topk(X, -1), ValueError, "batch_topk: k must be 0 or more, got -1"),
        mistake(lambda: tt.batch_topk(INTEGERS, 1), TypeError, "batch_topk", "torch.int64", FLOATS),
    ],
    "BatchTopK": [
        mistake(lambda: tt.nn.BatchTopK("32"), TypeError, "BatchTopK: k must be a number, got str '32'"),  # type: ignore[arg-type]
        mistake(lambda: tt.nn.BatchTopK(32, 99), ValueError, "BatchTopK: momentum must be 0 to 1, got 99"),
        mistake(lambda: tt.nn.BatchTopK(32)(INTEGERS), TypeError, "BatchTopK: input has dtype torch.int64", FLOATS),
    ],
    "threshold_grad": of_a_gate("threshold_grad", "threshold")[:-1],
    "threshold_gradients_": [
        mistake(lambda: tt.threshold_gradients_(LAYER, 0.1), TypeError, "parameters", "got Linear", "parameters()"),
        mistake(
            lambda: tt.threshold_gradients_(0.1, 0.1), TypeError, "parameters must be a tensor or an iterable", "float"
        ),  # type: ignore[arg-type]
        mistake(lambda: tt.threshold_gradients_([0.1], 0.1), TypeError, "parameters[0] must be a tensor, got float"),  # type: ignore[list-item]
        mistake(
            lambda: tt.threshold_gradients_(LAYER.named_parameters(), 0.1),  # type: ignore[arg-type]
            TypeError,
            "parameters[0] must be a tensor, got tuple",
            "without names",
        ),
        mistake(lambda: tt.threshold_gradients_(LAYER.parameters(), "0.1"), TypeError, MANY, "str '0.1'"),  # type: ignore[arg-type]
        mistake(lambda: tt.threshold_gradients_(LAYER.parameters(), [0.1]), ValueError, "1 entries for 2 parameters"),
        mistake(lambda: tt.threshold_gradients_(LAYER.parameters(), [0.1, "a"]), TypeError, "threshold[1]", "str 'a'"),  # type: ignore[list-item]
        mistake(lambda: tt.threshold_gradients_(LAYER.parameters(), PARAMETER), ValueError, "threshold requires grad"),
        mistake(lambda: tt.threshold_gradients_(LAYER.parameters(), X), ValueError, "(2, 3)", "one per parameter"),
    ],
    "GradientThreshold": [
        mistake(lambda: tt.GradientThreshold(LAYER.parameters(), 0.1), TypeError, "torch.optim.Optimizer", "generator"),  # type: ignore[arg-type]
        mistake(lambda: tt.GradientThreshold(LAYER, 0.1), TypeError, "optimizer must be", "Linear"),  # type: ignore[arg-type]
        mistake(lambda: tt.GradientThreshold(OPTIMIZER, "0.1"), TypeError, MANY, "str '0.1'"),
        mistake(lambda: tt.GradientThreshold(OPTIMIZER, None), TypeError, MANY, "NoneType None"),  # type: ignore[arg-type]
        mistake(lambda: tt.GradientThreshold(OPTIMIZER, [0.1]), ValueError, "1 entries for 2 parameters"),
        mistake(lambda: tt.GradientThreshold(OPTIMIZER), TypeError, "'threshold'"),  # type: ignore[call-arg]
    ],
    "Threshold": [
        mistake(lambda: tt.nn.Threshold("0.5")(X), TypeError, "threshold", NUMBER, "str '0.5'"),  # type: ignore[arg-type]
        mistake(lambda: tt.nn.Threshold(), TypeError, "'threshold'"),  # type: ignore[call-arg]
        mistake(lambda: tt.nn.Threshold(PARAMETER)(X), ValueError, "threshold requires grad", "jumprelu"),
    ],
    "Hardshrink": [
        mistake(lambda: tt.nn.Hardshrink(torch.ones(2))(X), ValueError, "lambd", "(2,)", "(2, 3)"),
        mistake(lambda: tt.nn.Hardshrink()(INTEGERS), TypeError, "hardshrink", "torch.int64", FLOATS),
    ],
    "Softshrink": [mistake(lambda: tt.nn.Softshrink(-1.0)(X), OutOfRange, "lambd must be at least 0, got -1.0")],
    "BinaryThreshold": [
        mistake(lambda: tt.nn.BinaryThreshold(None)(X), TypeError, "threshold", NUMBER, "NoneType None")
    ],  # type: ignore[arg-type]
    "JumpReLU": [
        *of_a_bandwidth(lambda bandwidth: tt.nn.JumpReLU(3, bandwidth=bandwidth), "JumpReLU"),
        mistake(lambda: tt.nn.JumpReLU("512"), ValueError, "num_features must be a size or a tuple of sizes", "'512'"),  # type: ignore[arg-type]
        mistake(lambda: tt.nn.JumpReLU(-1), ValueError, "num_features must be a size or a tuple of sizes", "-1"),
        mistake(lambda: tt.nn.JumpReLU(3, threshold="a"), TypeError, "threshold must be a number, got str 'a'"),  # type: ignore[arg-type]
        mistake(lambda: tt.nn.JumpReLU(3, torch.ones(2)), ValueError, "threshold has shape (2,)", "a number", "(3,)"),
        mistake(lambda: tt.nn.JumpReLU(4)(X), ValueError, "threshold has shape (4,)", "(2, 3)"),
        mistake(lambda: tt.nn.JumpReLU(3).l0([1.0]), TypeError, "input must be a tensor, got list"),  # type: ignore[arg-type]
    ],
    "fused_loss": [
        mistake(lambda: tt.fused_loss(0.5), TypeError, "fused_loss: formula must be a function, got float 0.5"),  # type: ignore[arg-type]
        mistake(lambda: tt.fused_loss(lambda x, weight: x), TypeError, "parameter 'weight'", "rename it"),
        mistake(lambda: tt.fused_loss(lambda x, *y: x), TypeError, "*y", "expected parameters with names"),
        mistake(lambda: tt.fused_loss(squared)([1.0], Y), TypeError, "x must be a tensor, got list"),
        mistake(lambda: tt.fused_loss(squared)(X, Y[0, :2]), ValueError, "y has shape (2,)", "broadcast", "(2, 3)"),
        mistake(lambda: tt.fused_loss(squared)(X, PARAMETER), ValueError, "y requires grad", "only x", "__wrapped__"),
        mistake(lambda: tt.fused_loss(squared)(X, Y, mask=Y), TypeError, "mask has dtype torch.float32", "torch.bool"),
    ],
    "set_backend": [mistake(lambda: tt.set_backend("cuda"), ValueError, f"set_backend: {BACKENDS}", "'cuda'")],
    "use_backend": [
        mistake(entered("gpu"), ValueError, f"use_backend: {BACKENDS}", "'gpu'"),
        mistake(entered(None), ValueError, f"use_backend: {BACKENDS}", "None"),
    ],
    "explain": [
        mistake(
            lambda: tt.explain("hardshrnk", X), ValueError, "name must be one of threshold, hardshrink", "hardshrnk"
        ),
        mistake(lambda: tt.explain("hardshrink"), TypeError, "explain: hardshrink", "'input'"),
        mistake(lambda: tt.explain("hardshrink", X, threshold=0.5), TypeError, "explain: hardshrink", "'threshold'"),
        mistake(lambda: tt.explain("hardshrink", [0.1]), TypeError, "input must be a tensor, got list"),
        mistake(lambda: tt.explain("hardshrink", INTEGERS), TypeError, "input has dtype torch.int64", FLOATS),
        mistake(lambda: tt.explain("hardshrink", X, "0.5"), TypeError, "lambd", NUMBER, "str '0.5'"),
        mistake(lambda: tt.explain("hardshrink", X, ELSEWHERE), RuntimeError, "lambd is on meta", "expected cpu"),
        mistake(lambda: tt.explain("hardshrink", X, PARAMETER), ValueError, "lambd requires grad", "jumprelu"),
        mistake(lambda: tt.explain("jumprelu", X, 0.5, -1.0), ValueError, "bandwidth", "above 0, got -1.0"),
        mistake(lambda: tt.explain("threshold_mse_loss", X, Y[:1], 0.5), ValueError, "(1, 3)", "(2, 3)"),
        mistake(lambda: tt.explain("threshold_loss", X, Y, "ByLoss"), TypeError, "rule", RULES, "str"),
        mistake(lambda: tt.explain("threshold_loss", X, Y, tt.ByLoss("1")), TypeError, "loss_threshold", NUMBER),  # type: ignore[arg-type]
        mistake(lambda: tt.explain("threshold_gradients_", LAYER, 0.1), TypeError, "parameters()", "Linear"),
        mistake(lambda: tt.explain("threshold_gradients_", [X], "0.1"), TypeError, MANY, "str '0.1'"),
        mistake(forced(lambda: tt.explain("hardshrink", X)), RuntimeError, "triton", "auto"),
    ],
}
MISTAKES["threshold_loss"] += [
    mistake(lambda: tt.threshold_loss(X, Y, "ByLoss"), TypeError, "rule must be None or one of", RULES, "str"),  # type: ignore[arg-type]
    mistake(lambda: tt.threshold_loss(X, Y, tt.ByLoss), TypeError, "rule must be None or one of", RULES, "type"),  # type: ignore[arg-type]
    mistake(lambda: tt.threshold_loss(X, Y, tt.ByLoss(), base="bec"), ValueError, "base", "'bce_with_logits'", "'bec'"),
    mistake(
        lambda: tt.threshold_loss(X, Y, tt.ByLoss(), base="mse", pos_weight=2.0),
        ValueError,
        "pos_weight goes with base 'bce_with_logits', got base 'mse'",
    ),
]
MISTAKES["linear_threshold_loss"] = [
    mistake(lambda: tt.linear_threshold_loss(X, X, labels=torch.zeros(1, 1)), TypeError, "labels", "int64", "float32"),
    mistake(lambda: tt.linear_threshold_loss(X, X), ValueError, "target", "labels", "neither"),
]
MISTAKES["LinearThresholdLoss"] = [
    mistake(lambda: tt.nn.LinearThresholdLoss(8, 3)(torch.zeros(2, 4)), ValueError, "weight has shape", "(2, 4)"),
]
for op in GATES.values():  # a gate without mistakes of its own
    if op.name in tt.__all__:
        MISTAKES.setdefault(op.name, of_a_gate(op.name, op.names[0], learns=op.learns))
CASES = [pytest.param(m, id=f"{name}-{i}") for name, of in MISTAKES.items() for i, m in enumerate(of)]


def test_every_public_entry_is_here() -> None:
    public = (
        {name for name in tt.__all__ if callable(getattr(tt, name))} | set(tt.functional.__all__) | set(tt.nn.__all__)
    )
    cannot_fail = {"Explanation", "Operand", "get_backend", "ops"}
    assert set(MISTAKES) == public - cannot_fail


@pytest.mark.parametrize("case", CASES)
def test_the_error_says_what_was_wrong(case: Mistake) -> None:
    setting = tt.get_backend()
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    said = str(caught.value)
    assert not [word for word in case.words if word not in said], said
    assert tt.get_backend() == setting
    assert LAYER.weight.grad is None


def test_what_explain_refuses_is_what_the_call_refuses() -> None:
    """And what one takes the other takes: on a device without memory, also device scalars."""
    x = torch.rand(4, 8, device="meta", requires_grad=True)
    for threshold in (0.5, torch.tensor(0.5), x.detach().mean(), x.detach(), x.detach()[0]):
        for name in ("threshold", "hardshrink", "softshrink", "jumprelu", "threshold_grad"):
            assert tt.explain(name, x, threshold).op == name
    assert tt.explain("hardshrink", x * 2, inplace=True).op == "hardshrink"
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        tt.explain("hardshrink", x, inplace=True)
