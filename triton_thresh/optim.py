"""Gradient thresholding before every step of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from .functional import threshold_gradients_
from .gradients import check_thresholds

if TYPE_CHECKING:
    from typing_extensions import Self

Threshold = Union[float, Sequence[float], Tensor]


class GradientThreshold:
    """Threshold the gradients of an optimizer's parameters before each of its steps, by `threshold_gradients_`.

    ``p.grad = g where |g| > threshold or g is NaN, else 0``, when gradients are whole: accumulated over the backwards since the
    last step, reduced over processes, and unscaled. With a `torch.amp.GradScaler` the order is that of gradient clipping:

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # thresholds, then steps
        scaler.update()

    A closure given to ``step`` (as LBFGS needs) is thresholded after each of its evaluations. Copies and pickles of an
    optimizer have no hooks, so not this one either.

    An optimizer that wraps one other optimizer of the same parameters, as accelerate, Lightning, Lookahead and SAM do, is
    unwrapped: gradients are thresholded before each step of the innermost optimizer, because that step changes the parameters.

    Args:
        optimizer: whose parameters; those of groups added later are included.
        threshold: a number or 0-dim tensor, or one for each of the parameters in the order of ``optimizer.param_groups``, as
            `threshold_gradients_` takes it.
        track_kept: keep the fraction of elements that the last step kept, as the 0-dim tensor `kept` (None before the first).
            Under ``fully_shard`` (FSDP2) and ``FullyShardedDataParallel(..., use_orig_params=True)`` (FSDP1, over the default
            process group) it is that of all ranks. Flat parameters hold padding, which counts.

    Raises:
        TypeError: as `threshold_gradients_`, for an optimizer that is none, and for one whose ``step`` does not run the hooks
            of `torch.optim.Optimizer` and that cannot be unwrapped.
        ValueError: as `threshold_gradients_`; at each step too, when parameters were added meanwhile.
        RuntimeError: in a step, if a GradScaler left unscaling to the step of a fused optimizer: call ``unscale_`` first.

    Shape:
        Gradients keep theirs; dtypes are those of `threshold_gradients_`.

    Equivalent to:
        ``threshold_gradients_(parameters, threshold)`` before each ``optimizer.step()``

    Source:
        `torch.optim.Optimizer.register_step_pre_hook`.

    Examples:
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> with GradientThreshold(optimizer, 0.5):
        ...     (weight * torch.tensor([0.2, 0.5, 3.0])).sum().backward()
        ...     optimizer.step()
        >>> weight.detach()
        tensor([ 0.,  0., -3.])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, threshold: Threshold, *, track_kept: bool = False) -> None:
        if not _steps(optimizer):
            raise TypeError(
                f"GradientThreshold: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; for parameters "
                "without one there is threshold_gradients_"
            )
        innermost = _innermost(optimizer)
        if not _runs_hooks(innermost):
            raise TypeError(
                f"GradientThreshold: {type(innermost).__name__}.step does not run the hooks of torch.optim.Optimizer, so nothing "
                "would be thresholded; pass the optimizer that it wraps, or call threshold_gradients_ before each step"
            )
        check_thresholds("GradientThreshold", threshold, len(_parameters(innermost)))
        self.threshold = threshold
        self.track_kept = track_kept
        self.kept: Tensor | None = None
        self._handle = innermost.register_step_pre_hook(self._before_step)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "GradientThreshold: the gradients are still scaled; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._apply(optimizer)
            return None

        def thresholded() -> Any:
            loss = closure()
            self._apply(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], thresholded, *args[2:]), kwargs
        return args, {**kwargs, "closure": thresholded}

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        self.kept = threshold_gradients_(_parameters(optimizer), self.threshold, return_kept=self.track_kept)

    def remove(self) -> None:
        """Take it off the optimizer; again does nothing."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"GradientThreshold(threshold={self.threshold!r}, track_kept={self.track_kept})"


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _steps(found: object) -> bool:
    """True for an optimizer, or what wraps one."""
    return hasattr(found, "param_groups") and callable(getattr(found, "step", None))


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or the one of the same parameters that it wraps, through any number of wrappers.

    One of other parameters is left alone: that inside of ZeroRedundancyOptimizer has a part of them.
    """
    parameters = list(map(id, _parameters(optimizer)))
    seen = {id(optimizer)}
    while True:
        held = {id(v): v for v in vars(optimizer).values() if id(v) not in seen and _steps(v)}
        wrapped = [v for v in held.values() if list(map(id, _parameters(v))) == parameters]
        if len(wrapped) != 1:
            return optimizer
        (optimizer,) = wrapped
        seen.add(id(optimizer))


def _runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """True if `step` is the one that the constructor of torch.optim.Optimizer prepares, and a place for hooks exists."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(optimizer.step, "hooked", False)
