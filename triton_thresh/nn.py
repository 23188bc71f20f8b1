"""Modules over the functions: thin, with no state but their settings."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, topk
from .bases import Base, BaseName
from .checks import Operand, Reduction, as_float, check_number, check_positive, check_real
from .rules import Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AsymmetricLoss",
    "BatchTopK",
    "BinaryThreshold",
    "ExceedanceMSELoss",
    "Hardshrink",
    "JumpReLU",
    "LinearThresholdLoss",
    "ProximityMSELoss",
    "SigmoidFocalLoss",
    "Softshrink",
    "Threshold",
    "ThresholdBCELoss",
    "ThresholdBCEWithLogitsLoss",
    "ThresholdLoss",
    "ThresholdMSELoss",
]


class _Module(nn.Module):
    """The part that all modules share."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__}: torch.jit.script cannot compile this module; use torch.compile, torch.export or "
            "torch.jit.trace"
        )


class _Settings(_Module):
    """Keeps its settings as attributes (tensors as buffers, so that ``to`` moves them) and shows them all in ``repr``."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in self._settings)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor({tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')})"
    return repr(value)


class Threshold(_Settings):
    """`functional.threshold` as a module, a drop-in for `torch.nn.Threshold`: ``y = value where x <= threshold else x``.

    Args:
        threshold: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        value: the number put in.
        inplace: write the result to the input.

    Shape, dtypes, errors and source are those of `functional.threshold`, when the module is called.

    Equivalent to:
        ``functional.threshold(input, threshold, value, inplace=inplace)``

    Examples:
        >>> Threshold(0.1, 20.0)
        Threshold(threshold=0.1, value=20.0, inplace=False)
        >>> Threshold(0.1, 20.0)(torch.tensor([-1.0, 2.0]))
        tensor([20.,  2.])
    """

    threshold: Operand
    value: float
    inplace: bool

    def __init__(self, threshold: Operand, value: float = 0.0, inplace: bool = False) -> None:
        super().__init__(threshold=threshold, value=value, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold(input, self.threshold, self.value, inplace=self.inplace)


class Hardshrink(_Settings):
    """`functional.hardshrink` as a module, a drop-in for `torch.nn.Hardshrink`: ``y = 0 where |x| <= lambd else x``.

    Args:
        lambd: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        inplace: write the result to the input.

    Shape, dtypes, errors and source are those of `functional.hardshrink`, when the module is called.

    Equivalent to:
        ``functional.hardshrink(input, lambd, inplace=inplace)``

    Examples:
        >>> Hardshrink(0.5)(torch.tensor([-1.0, 0.2]))
        tensor([-1.,  0.])
    """

    lambd: Operand
    inplace: bool

    def __init__(self, lambd: Operand = 0.5, inplace: bool = False) -> None:
        super().__init__(lambd=lambd, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardshrink(input, self.lambd, inplace=self.inplace)


class Softshrink(_Settings):
    """`functional.softshrink` as a module, a drop-in for `torch.nn.Softshrink`, whose `lambd` may learn.

    ``y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0``.

    Args:
        lambd: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer. An `nn.Parameter` learns.

    Shape, dtypes, errors and source are those of `functional.softshrink`, when the module is called.

    Equivalent to:
        ``functional.softshrink(input, lambd)``

    Examples:
        >>> Softshrink(0.5)(torch.tensor([-1.0, 0.2]))
        tensor([-0.5000,  0.0000])
    """

    lambd: Operand

    def __init__(self, lambd: Operand = 0.5) -> None:
        super().__init__(lambd=lambd)

    def forward(self, input: Tensor) -> Tensor:
        return functional.softshrink(input, self.lambd)


_WIDE = (torch.float32, torch.float64)
_PARAMETERS = {"raw": "threshold", "log": "log_threshold"}


def _above_0(threshold: float | Tensor) -> bool:
    if isinstance(threshold, Tensor):
        return threshold.is_meta or bool((threshold > 0).all())
    return threshold > 0


class JumpReLU(_Module):
    """`functional.jumprelu` with a threshold per feature that learns: ``y = x where x > θ else 0``.

    With the parametrization "raw" θ is the parameter `threshold`. An optimizer's step may put it below 0; `project_`, called
    before the forward, lifts it to 0 again. With "log" the parameter is `log_threshold` and θ its exponential, which is always
    above 0. `load_state_dict` takes the entry of either name and converts it.

    The parameter is float32 or wider, because steps as small as those of thresholds are rounded away in 16 bits. Casts of the
    module to a 16-bit type leave it as it is, and 16-bit parameters that are loaded or assigned become float32.

    **Sharded over processes.** FSDP shards parameters of one dtype together, so that a JumpReLU inside of a 16-bit model is
    wrapped apart from it, and without mixed precision, which would cast the parameter. The thresholds' gradients are then
    reduced over the ranks in float32. Where a model calls ``activation.l0(x)``, write ``activation(x, return_l0=True)``: FSDP
    gathers a parameter for calls of the module itself.

        fully_shard(model.activation)  # FSDP2: the JumpReLU first, then the model
        fully_shard(model, mp_policy=...)

        policy = ModuleWrapPolicy({JumpReLU})  # FSDP1: unit by unit, where the parameters have their dtype already
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True)

    Where FSDP1 casts (``mixed_precision=...``), wrap ``model.activation`` by hand, without that argument, and then the model.

    Args:
        num_features: the size of the inputs' last dimension, or the shape of their last dimensions.
        threshold: the initial θ: a number, or a tensor of the features' shape, which is copied. Above 0 for "log".
        bandwidth: the width of the window in which a threshold gets a gradient.
        parametrization: "raw" or "log".
        input_gradient: the window term also reaches the input, with the opposite sign.
        device: of the parameter.
        dtype: of the parameter, float32 or float64.

    Shape:
        The output has the input's shape, dtype and memory format; dtypes are those of `functional.jumprelu`.

    Raises:
        TypeError: for settings that are no numbers, and a dtype of 16 bits; when called, as `functional.jumprelu`.
        ValueError: for sizes below 0, a threshold of another shape or without a logarithm, an unknown parametrization, and a
            bandwidth that is not above 0; when called, for an input to whose shape the thresholds do not broadcast.

    Equivalent to:
        ``functional.jumprelu(input, theta, bandwidth, input_gradient=input_gradient)``

    Source:
        Rajamanoharan et al. 2024 (arXiv:2407.14435), whose parameter is the logarithm.

    Examples:
        >>> activation = JumpReLU(4, threshold=0.5, bandwidth=0.25).bfloat16()
        >>> activation
        JumpReLU(4, threshold=0.5, bandwidth=0.25, parametrization='raw', input_gradient=False, dtype=torch.float32)
        >>> activation.threshold
        Parameter containing:
        tensor([0.5000, 0.5000, 0.5000, 0.5000], requires_grad=True)
        >>> activations, l0 = activation.l0(torch.tensor([[0.0, 0.5, 0.6, 2.0]]))
        >>> l0.detach()
        tensor([2.])
    """

    threshold: nn.Parameter
    log_threshold: nn.Parameter

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        threshold: float | Tensor = 1e-3,
        bandwidth: float = 1e-3,
        *,
        parametrization: str = "raw",
        input_gradient: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = num_features if isinstance(num_features, (tuple, list)) else (num_features,)
        try:
            shape = tuple(map(operator.index, sizes))
        except TypeError:
            shape = (-1,)
        if min(shape, default=0) < 0:
            raise ValueError(f"JumpReLU: num_features must be a size or a tuple of sizes, got {num_features!r}")
        if parametrization not in _PARAMETERS:
            raise ValueError(f"JumpReLU: parametrization must be 'raw' or 'log', got {parametrization!r}")
        if dtype not in _WIDE:
            raise TypeError(f"JumpReLU: dtype must be torch.float32 or torch.float64, got {dtype!r}")
        self.num_features = shape if isinstance(num_features, (tuple, list)) else shape[0]
        self.parametrization = parametrization
        self.initial_threshold = self._initial(threshold, shape)
        self.bandwidth = check_positive("JumpReLU", "bandwidth", bandwidth)
        self.input_gradient = input_gradient
        self.register_parameter(
            _PARAMETERS[parametrization], nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        )
        self.reset_parameters()

    @property
    def theta(self) -> Tensor:
        """The thresholds that inputs are compared with: `threshold`, or the exponential of `log_threshold`."""
        return self.threshold if self.parametrization == "raw" else self.log_threshold.exp()

    def _initial(self, threshold: float | Tensor, shape: tuple[int, ...]) -> float | Tensor:
        """The initial threshold, checked: a float, or a tensor of its own."""
        if isinstance(threshold, Tensor) and (threshold.dim() or not shape):
            check_real("JumpReLU", "threshold", threshold)
            if threshold.shape != shape:
                raise ValueError(
                    f"JumpReLU: threshold has shape {tuple(threshold.shape)}, expected a number or a tensor of shape {shape}"
                )
            initial: float | Tensor = threshold.detach().clone()
        else:
            initial = as_float("JumpReLU", "threshold", check_number("JumpReLU", "threshold", threshold))
        if self.parametrization == "log" and not _above_0(initial):
            raise ValueError(f"JumpReLU: threshold must be above 0 for parametrization 'log', got {threshold}")
        return initial

    def reset_parameters(self) -> None:
        """Set every threshold to the initial value."""
        initial, takes_log = self.initial_threshold, self.parametrization == "log"
        parameter = getattr(self, _PARAMETERS[self.parametrization])
        with torch.no_grad():
            if isinstance(initial, Tensor):
                parameter.copy_(initial.to(parameter.dtype).log() if takes_log else initial)
            else:
                parameter.fill_(math.log(initial) if takes_log else initial)

    def forward(self, input: Tensor, *, return_l0: bool = False) -> Any:
        """The activations; with `return_l0` what `l0` returns."""
        # asked by identity, which torch.fx does not trace: of the module alone it traces the activations
        function = functional.jumprelu_l0 if return_l0 is True else functional.jumprelu
        return function(input, self.theta, self.bandwidth, input_gradient=self.input_gradient)

    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The activations, and how many of each row are kept, whose gradient reaches the thresholds."""
        return self(input, return_l0=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def project_(self) -> Self:
        """Lift thresholds below 0 to 0, outside of the graph; with the parametrization "log" there are none."""
        if self.parametrization == "raw":
            self.threshold.clamp_(min=0)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, which becomes float32 unless it is as wide: so does one that is assigned or loaded."""
        if param is not None and param.dtype not in _WIDE:
            param = nn.Parameter(param.detach().to(torch.float32), param.requires_grad)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keeping_width(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in _WIDE else tensor.to(moved.device)

        return super()._apply(keeping_width, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        other = "raw" if self.parametrization == "log" else "log"
        own, foreign = prefix + _PARAMETERS[self.parametrization], prefix + _PARAMETERS[other]
        name = own if own in state_dict else foreign
        value = state_dict.get(name)
        if isinstance(value, Tensor) and (name == foreign or value.dtype not in _WIDE):
            value = value.detach().to(value.dtype if value.dtype in _WIDE else torch.float32)
            state_dict = {key: kept for key, kept in state_dict.items() if key != name}  # not the caller's
            state_dict[own] = value if name == own else self._converted(value, name, errors=arguments[-1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _converted(self, value: Tensor, name: str, errors: list[str]) -> Tensor:
        """The other parametrization's entry as this one's."""
        if self.parametrization == "raw":
            return value.exp()
        if _above_0(value):
            return value.log()
        errors.append(
            f"{name} has values that are not above 0, so without a logarithm; parametrization='raw' takes them."
        )
        return self.log_threshold

    def extra_repr(self) -> str:
        settings = {
            "threshold": _shown(self.initial_threshold),
            "bandwidth": self.bandwidth,
            "parametrization": repr(self.parametrization),
            "input_gradient": self.input_gradient,
            "dtype": getattr(self, _PARAMETERS[self.parametrization]).dtype,
        }
        return ", ".join([str(self.num_features), *(f"{name}={value}" for name, value in settings.items())])


class BatchTopK(_Module):
    """`batch_topk` in training, a JumpReLU in evaluation, at a threshold that training tracks.

    Each call in training moves the buffer `topk_threshold` t (float64, 0 at first, whatever the module is cast to) towards the
    smallest element kept: ``t = (1 - momentum) * t + momentum * smallest``, unchanged where none is kept. In evaluation
    ``y = x where x > t else 0``, so that a sample does not depend on its batch.

    t comes from 0: after n calls it is still ``(1 - momentum)**n`` of the way away, 37 % after 100 calls with the default. An
    evaluation before that keeps more than `k` elements. Set the buffer yourself to start elsewhere.

    Args:
        k: how many elements a row keeps on average, a number of at least 0.
        momentum: from 0 to 1.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for settings that are no numbers; when called, for other dtypes than those of `batch_topk`.
        ValueError: for a negative `k`, and a `momentum` outside [0, 1].

    Equivalent to:
        ``batch_topk(input, k)`` in training, ``functional.jumprelu(input, topk_threshold)`` in evaluation

    Source:
        Bussmann et al. 2024 (arXiv:2412.06410). SAELens names the buffer so too: its training checkpoints load.

    Examples:
        >>> activation = BatchTopK(1, momentum=0.5)
        >>> activation(torch.tensor([[3.0, -1.0, 2.0], [0.5, 1.0, -4.0]]))
        tensor([[3., 0., 2.],
                [0., 0., 0.]])
        >>> activation.topk_threshold
        tensor(1., dtype=torch.float64)
        >>> activation.eval()(torch.tensor([0.5, 1.5]))
        tensor([0.0000, 1.5000])
    """

    topk_threshold: Tensor

    def __init__(self, k: float, momentum: float = 0.01) -> None:
        super().__init__()
        self.k = topk.check_k("BatchTopK", k)
        self.momentum = check_number("BatchTopK", "momentum", momentum)
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"BatchTopK: momentum must be 0 to 1, got {momentum!r}")
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return functional._batch_topk_tracked(input, self.k, self.momentum, self.topk_threshold)
        return functional._above_tracked(input, self.topk_threshold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keeping_float64(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float64 else tensor.to(moved.device)

        return super()._apply(keeping_float64, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        name = prefix + "topk_threshold"  # with assign=True it would become the buffer as it is
        value = state_dict.get(name)
        if isinstance(value, Tensor) and value.dtype != torch.float64:
            state_dict = {**state_dict, name: value.to(torch.float64)}  # not the caller's
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"k={self.k}, momentum={self.momentum}"


class BinaryThreshold(_Settings):
    """`functional.binary_threshold` as a module: ``y = above_value where x > threshold else below_value``.

    Args:
        threshold: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        above_value: the number where x is above.
        below_value: the number elsewhere.
        dtype: of the output; the input's if None.

    Shape, dtypes, errors and source are those of `functional.binary_threshold`, when the module is called.

    Equivalent to:
        ``functional.binary_threshold(input, threshold, above_value, below_value, dtype=dtype)``

    Examples:
        >>> BinaryThreshold(0.5, 1.0, -1.0)(torch.tensor([0.2, 0.9]))
        tensor([-1.,  1.])
    """

    threshold: Operand
    above_value: float
    below_value: float
    dtype: torch.dtype | None

    def __init__(
        self,
        threshold: Operand,
        above_value: float = 1.0,
        below_value: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(threshold=threshold, above_value=above_value, below_value=below_value, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.binary_threshold(input, self.threshold, self.above_value, self.below_value, dtype=self.dtype)


class _Loss(_Settings):
    """A loss by the name of its function. Its call may have a weight and a divisor of its own, and a mask."""

    function: ClassVar[str]

    def _arguments(self) -> dict[str, Any]:
        """The settings, as the function takes them."""
        return {name: getattr(self, name) for name in self._settings}

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Operand | None = None,
        mask: Tensor | None = None,
        divisor: Operand | None = None,
    ) -> Tensor:
        given = {"weight": weight, "mask": mask, "divisor": divisor}
        arguments = self._arguments() | {name: value for name, value in given.items() if value is not None}
        # looked up here, where torch.fx.symbolic_trace has put a function that makes a node
        return getattr(functional, self.function)(input, target, **arguments)  # type: ignore[no-any-return]


class ThresholdBCELoss(_Loss):
    """`functional.threshold_bce_loss` as a module: BCE of probabilities, weighed by the prediction.

    ``weight_above where p >= threshold else weight_below``.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.threshold_bce_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_bce_loss(input, target, ...)``

    Examples:
        >>> ThresholdBCELoss(0.7)(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
        tensor(0.0638)
    """

    function = "threshold_bce_loss"

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_stats=return_stats,
        )


class ThresholdBCEWithLogitsLoss(_Loss):
    """`functional.threshold_bce_with_logits_loss` as a module: BCE of logits, weighed by the prediction.

    ``weight_above where sigmoid(x) >= threshold else weight_below``; `threshold` is a probability.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        pos_weight: the factor of positive targets, a number or a tensor.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.threshold_bce_with_logits_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_bce_with_logits_loss(input, target, ...)``

    Examples:
        >>> ThresholdBCEWithLogitsLoss(0.7)(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
        tensor(0.0791)
    """

    function = "threshold_bce_with_logits_loss"

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        pos_weight: Operand | None = None,
        ignore_index: float | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            pos_weight=pos_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_stats=return_stats,
        )


class ThresholdMSELoss(_Loss):
    """`functional.threshold_mse_loss` as a module: squared error, weighed by the prediction.

    ``weight_above where x >= threshold else weight_below``.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.threshold_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_mse_loss(input, target, ...)``

    Examples:
        >>> ThresholdMSELoss(2.0)(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor(2.0500)
    """

    function = "threshold_mse_loss"

    def __init__(
        self,
        threshold: Operand,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            return_stats=return_stats,
        )


class ProximityMSELoss(_Loss):
    """`functional.proximity_mse_loss` as a module: squared error that weighs more near a threshold.

    ``1 + penalty_factor * (1 - d / penalty_range) where d = |x - threshold| < penalty_range else 1``.

    Args:
        threshold: what to stay away from: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        penalty_range: how far its influence reaches, a number or a tensor.
        penalty_factor: the extra weight at the threshold itself, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.proximity_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.proximity_mse_loss(input, target, ...)``

    Examples:
        >>> ProximityMSELoss(0.5)(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0]))
        tensor(0.8125)
    """

    function = "proximity_mse_loss"

    def __init__(
        self,
        threshold: Operand,
        penalty_range: Operand = 0.2,
        penalty_factor: Operand = 1.5,
        *,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            threshold=threshold,
            penalty_range=penalty_range,
            penalty_factor=penalty_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            return_stats=return_stats,
        )


class ExceedanceMSELoss(_Loss):
    """`functional.exceedance_mse_loss` as a module: squared error that weighs large errors more.

    ``penalty_factor where (x - y)**2 > loss_threshold else 1``.

    Args:
        loss_threshold: the element loss above which the factor applies, a number or a tensor.
        penalty_factor: that factor, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.exceedance_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.exceedance_mse_loss(input, target, ...)``

    Examples:
        >>> ExceedanceMSELoss()(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0]))
        tensor(4.1250)
    """

    function = "exceedance_mse_loss"

    def __init__(
        self,
        loss_threshold: Operand = 1.0,
        penalty_factor: Operand = 2.0,
        *,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            loss_threshold=loss_threshold,
            penalty_factor=penalty_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            return_stats=return_stats,
        )


class SigmoidFocalLoss(_Loss):
    """`functional.sigmoid_focal_loss` as a module: the focal loss of logits.

    ``a_t (1 - p_t)**gamma BCE(x, y)``.

    Args:
        alpha: the weight of positives, a number or a tensor; None or -1 for none.
        gamma: how much easy examples lose, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "none", "mean" or "sum" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.sigmoid_focal_loss`, when the module is called.

    Equivalent to:
        ``functional.sigmoid_focal_loss(input, target, ...)``

    Examples:
        >>> SigmoidFocalLoss(reduction="mean")(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor(0.6404)
    """

    function = "sigmoid_focal_loss"

    def __init__(
        self,
        alpha: Operand | None = 0.25,
        gamma: Operand = 2.0,
        reduction: Reduction = "none",
        *,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        label_smoothing: float = 0,
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            return_stats=return_stats,
        )


class AsymmetricLoss(_Loss):
    """`functional.asymmetric_loss` as a module: the asymmetric loss of logits, for many labels.

    `Asymmetric` has the formula.

    Args:
        gamma_neg: the exponent of negatives, a number or a tensor.
        gamma_pos: that of positives, a number or a tensor.
        clip: negatives predicted below it cost nothing; None is 0.
        eps: the least argument of the logarithms.
        detach_focal: the factor has no gradient.
        weight: a further factor of each element, a number or a tensor.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "sum", "mean" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.asymmetric_loss`, when the module is called.

    Equivalent to:
        ``functional.asymmetric_loss(input, target, ...)``

    Examples:
        >>> AsymmetricLoss()(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor(1.1930)
    """

    function = "asymmetric_loss"

    def __init__(
        self,
        gamma_neg: Operand = 4.0,
        gamma_pos: Operand = 1.0,
        clip: Operand | None = 0.05,
        eps: Operand = 1e-8,
        *,
        detach_focal: bool = False,
        weight: Operand | None = None,
        ignore_index: float | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "sum",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            clip=clip,
            eps=eps,
            detach_focal=detach_focal,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_stats=return_stats,
        )


class ThresholdLoss(_Loss):
    """`functional.threshold_loss` as a module: any pair of a base and a rule.

    Args:
        rule: such as `ByOutcome`; tensors in it become buffers. None for weight 1.
        base: such as `Focal`; likewise. Or "bce", "bce_with_logits" or "mse".
        weight: a further factor of each element, a number or a tensor.
        pos_weight: the factor of positive targets, for base "bce_with_logits" alone.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "mean", "sum" or "none" (the mean divides by the number of elements, never by a sum of weights).
        return_stats: also return a `LossStats`.

    Shape, dtypes, errors and source are those of `functional.threshold_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_loss(input, target, rule, base=base, ...)``

    Examples:
        >>> from triton_thresh import ByOutcome
        >>> ThresholdLoss(ByOutcome(false_negative=10.0))(torch.tensor([2.0, -2.0]), torch.tensor([0.0, 1.0]))
        tensor(11.6981)
    """

    function = "threshold_loss"

    def __init__(
        self,
        rule: Rule | None = None,
        base: Base | BaseName = "bce_with_logits",
        *,
        weight: Operand | None = None,
        pos_weight: Operand | None = None,
        ignore_index: float | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            rule=rule,
            base=base,
            weight=weight,
            pos_weight=pos_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_stats=return_stats,
        )
        for name in ("rule", "base"):
            for field, value in _tensors(getattr(self, name)).items():
                self.register_buffer(f"{name}_{field}", value)

    def _arguments(self) -> dict[str, Any]:
        """The settings, with the tensors of the rule and the base where the module is."""
        return super()._arguments() | {name: self._moved(name) for name in ("rule", "base")}

    def _moved(self, name: str) -> Any:
        part = getattr(self, name)
        tensors = {field: getattr(self, f"{name}_{field}") for field in _tensors(part)}
        return replace(part, **tensors) if tensors else part


def _tensors(part: object) -> dict[str, Tensor]:
    """The tensors of a rule or a base, by the names of their fields."""
    fields = vars(part) if is_dataclass(part) else {}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


class LinearThresholdLoss(_Module):
    """A linear layer and `functional.linear_threshold_loss` as a module: a classifier of many labels, trained without its logits.

    Args:
        in_features: the input's last dimension.
        num_labels: how many labels there are: rows of `weight`, entries of `bias`.
        rule: as in the function.
        bias: whether there is a bias.
        base: as in the function, and likewise all that follow but the last two.
        reduction: "mean" or "sum".
        divisor: what the mean divides by.
        label_smoothing: how far targets move to 1/2.
        chunk_size: labels in a chunk.
        device: of the parameters.
        dtype: of the parameters.

    Shape, dtypes, errors and source are those of `functional.linear_threshold_loss`, when the module is called. Parameters are
    made, and drawn, as those of `torch.nn.Linear`, whose state dict fits.

    Equivalent to:
        ``functional.linear_threshold_loss(input, weight, target, rule, labels=labels, bias=bias, ...)``

    Examples:
        >>> module = LinearThresholdLoss(8, 1000, base="bce_with_logits")
        >>> module
        LinearThresholdLoss(8, 1000, rule=None, bias=True, base='bce_with_logits', reduction='mean')
        >>> loss = module(torch.ones(2, 8), labels=torch.tensor([[3, 17], [5, -1]]))
        >>> loss.backward()
        >>> module.weight.grad.shape, module.logits(torch.ones(2, 8)).shape
        (torch.Size([1000, 8]), torch.Size([2, 1000]))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        rule: Rule | None = None,
        *,
        bias: bool = True,
        base: Base | BaseName = "bce_with_logits",
        reduction: Literal["mean", "sum"] = "mean",
        divisor: Operand | None = None,
        label_smoothing: float = 0,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_labels, self.rule, self.base = in_features, num_labels, rule, base
        self.reduction, self.divisor, self.label_smoothing = reduction, divisor, label_smoothing
        self.chunk_size = chunk_size
        self.weight = nn.Parameter(torch.empty(num_labels, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_labels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, target: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        return functional.linear_threshold_loss(
            input,
            self.weight,
            target,
            self.rule,
            labels=labels,
            bias=self.bias,
            base=self.base,
            reduction=self.reduction,
            divisor=self.divisor,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
        )

    def logits(self, input: Tensor) -> Tensor:
        """The logits of all labels, for inference: ``F.linear(input, weight, bias)``."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        settings = {"rule": self.rule, "bias": self.bias is not None, "base": self.base, "reduction": self.reduction}
        for name, default in (("divisor", None), ("label_smoothing", 0.0), ("chunk_size", None)):
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                settings[name] = value
        shown = [f"{name}={_shown(value)}" for name, value in settings.items()]
        return ", ".join([str(self.in_features), str(self.num_labels), *shown])


def __dir__() -> list[str]:
    return __all__
