"""Triton kernels for PyTorch for everything that compares a value with a threshold."""

import torch.fx as _fx

from . import functional, nn
from . import torch_ops as _torch_ops  # noqa: F401 - torch.ops.triton_thresh
from ._version import __version__
from .backend import get_backend, set_backend, use_backend
from .bases import BCE, MSE, Asymmetric, BCEWithLogits, EpsilonInsensitive, Focal, Hinge, Huber, Quantile
from .cells import LossStats
from .checks import Operand
from .explain import Explanation, explain
from .functional import (
    asymmetric_loss,
    batch_topk,
    binary_threshold,
    exceedance_mse_loss,
    firm,
    fused_loss,
    garrote,
    hardshrink,
    jumprelu,
    jumprelu_l0,
    linear_threshold_loss,
    otsu_threshold,
    proximity_mse_loss,
    quantile_threshold,
    sigmoid_focal_loss,
    softshrink,
    step,
    threshold,
    threshold_bce_loss,
    threshold_bce_with_logits_loss,
    threshold_grad,
    threshold_gradients_,
    threshold_loss,
    threshold_mse_loss,
    topk_threshold,
)
from .optim import GradientThreshold
from .registry import ops
from .rules import ByConfidence, ByLoss, ByOutcome, ByPrediction, ByProximity, ByRank

__all__ = [
    "BCE",
    "MSE",
    "Asymmetric",
    "BCEWithLogits",
    "ByConfidence",
    "ByLoss",
    "ByOutcome",
    "ByPrediction",
    "ByProximity",
    "ByRank",
    "EpsilonInsensitive",
    "Explanation",
    "Focal",
    "GradientThreshold",
    "Hinge",
    "Huber",
    "LossStats",
    "Operand",
    "Quantile",
    "__version__",
    "asymmetric_loss",
    "batch_topk",
    "binary_threshold",
    "exceedance_mse_loss",
    "explain",
    "firm",
    "functional",
    "fused_loss",
    "garrote",
    "get_backend",
    "hardshrink",
    "jumprelu",
    "jumprelu_l0",
    "linear_threshold_loss",
    "nn",
    "ops",
    "otsu_threshold",
    "proximity_mse_loss",
    "quantile_threshold",
    "set_backend",
    "sigmoid_focal_loss",
    "softshrink",
    "step",
    "threshold",
    "threshold_bce_loss",
    "threshold_bce_with_logits_loss",
    "threshold_grad",
    "threshold_gradients_",
    "threshold_loss",
    "threshold_mse_loss",
    "topk_threshold",
    "use_backend",
]

for _name in functional.__all__:  # functional.py says why; a name is wrapped where it is looked up
    _fx.wrap(_name)


def __dir__() -> list[str]:
    """The names that completion shows."""
    return __all__
