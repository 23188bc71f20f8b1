"""Autograd over the shells: one Function for all gates, one for all losses, one for gated gradients; more under transforms."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .backend import is_plain, use_backend
from .reference import LossSpec
from .rules import Operand

if TYPE_CHECKING:
    from .launch import GateCall
    from .registry import Gate as RegisteredGate

# ----------------------------------------------------------------------------------------------------------------- gates


class Gate(torch.autograd.Function):
    """A gate on Triton: saves one bit per element, or two where the threshold has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        threshold: Operand,
        call: GateCall,
        learned: str | None,
        inplace: bool,
    ) -> Tensor:
        from . import launch

        learns = ctx.needs_input_grad[1]
        if learns:
            assert learned is not None
            call = call._replace(function=learned)
            ctx.threshold_shape, ctx.threshold_dtype = threshold.shape, threshold.dtype  # type: ignore[union-attr]
        output, mask = launch.gate_forward(call, input, 2 if learns else 1, input if inplace else None)
        assert mask is not None
        ctx.save_for_backward(mask.bits)
        ctx.mask, ctx.backward_function = mask._replace(bits=None), f"{learned}_backward" if learns else None  # type: ignore[arg-type]
        if inplace:
            ctx.mark_dirty(input)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from . import launch

        (bits,) = ctx.saved_tensors
        mask = ctx.mask._replace(bits=bits)
        if torch.is_grad_enabled() or not is_plain(gradient):
            dx, dt = _masked(launch.unpack(mask), launch.unpack(mask, 1) if ctx.backward_function else None, gradient)
        else:
            dx, dt = launch.gate_backward(mask, gradient, ctx.backward_function)
        if dt is not None:
            dt = _summed(dt, ctx.threshold_shape).to(ctx.threshold_dtype)
        return dx, dt, None, None, None


def _masked(low: Tensor, high: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """A gate's backward in plain torch, linear in the gradient: dx, and softshrink's elementwise gradient of lambd."""
    if high is None:
        return torch.where(low, gradient, 0), None
    signed = torch.where(low, gradient, -gradient)
    return torch.where(low | high, gradient, 0), torch.where(high, signed, 0)


def _summed(elementwise: Tensor, shape: torch.Size) -> Tensor:
    """Summed over the dimensions along which `shape` was broadcast, in float32 or wider."""
    lead = elementwise.dim() - len(shape)
    dims = [d for d in range(elementwise.dim()) if d < lead or shape[d - lead] != elementwise.shape[d]]
    wide = torch.float64 if elementwise.dtype == torch.float64 else torch.float32
    total = elementwise.sum(dims, dtype=wide) if dims else elementwise
    return total.reshape(shape)


# ---------------------------------------------------------------------------------------------------------------- losses


def _parted(operands: Sequence[Operand]) -> tuple[list[Tensor], list[float | None]]:
    """The tensors among the operands, for save_for_backward, and the numbers, None where a tensor goes."""
    tensors = [value for value in operands if isinstance(value, Tensor)]
    return tensors, [None if isinstance(value, Tensor) else value for value in operands]


def _joined(tensors: Sequence[Tensor], numbers: Sequence[float | None]) -> list[Operand]:
    """The operands that `_parted` took apart."""
    supply = iter(tensors)
    return [next(supply) if value is None else value for value in numbers]


class Loss(torch.autograd.Function):
    """A loss on either backend (`shell`: the module launch or eager), its gradient computed in the forward pass where sound.

    The gradient buffer belongs to this node alone. The first backward scales it in place and hands it on; later ones
    recompute from the saved inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, spec: LossSpec, operands: Sequence[Operand], shell: ModuleType
    ) -> Tensor:
        fused = spec.reduction != "none" and input.dtype != torch.float16
        output, buffer = shell.loss_forward(spec, input, target, operands, want_gradient=fused)
        tensors, ctx.numbers = _parted(operands)
        ctx.save_for_backward(input, target, *tensors, buffer)
        ctx.spec, ctx.shell, ctx.spent = spec, shell, buffer is None
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, target, *tensors, buffer = ctx.saved_tensors
        operands = _joined(tensors, ctx.numbers)
        spec, shell = ctx.spec, ctx.shell
        if torch.is_grad_enabled() or not is_plain(gradient):
            dx = reference.loss_gradient(spec, input, target, operands, gradient)
        elif ctx.spent:
            dx = shell.loss_backward(spec, input, target, operands, gradient)
        else:
            ctx.spent = True
            # .data has a version counter of its own: neither the rescale nor what callers do to .grad spoils saved_tensors
            dx = buffer.data
            shell.loss_rescale(spec, dx, gradient)
        return dx, None, None, None, None


class TracedLoss(torch.autograd.Function):
    """The element loss in plain torch with its closed-form derivative: what compilers see."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, spec: LossSpec, operands: Sequence[Operand]) -> Tensor:
        return reference.element_loss(spec, input, target, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.spec, operands = inputs
        tensors, ctx.numbers = _parted(operands)
        ctx.save_for_backward(input, target, *tensors)

    @staticmethod
    def _slope(ctx: Any) -> Tensor:
        input, target, *tensors = ctx.saved_tensors
        operands = _joined(tensors, ctx.numbers)
        return reference.element_slope(ctx.spec, input, target, operands)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slope = TracedLoss._slope(ctx)
        return (slope * gradient).to(ctx.saved_tensors[0].dtype), None, None, None


class TransformedLoss(TracedLoss):
    """What torch.func transforms and forward-mode AD see; torch.compile traces neither a vmap rule nor a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        TracedLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, input: Tensor, *rest: Any) -> Tensor:
        slope = TracedLoss._slope(ctx)
        return slope * input.to(slope.dtype)


# ------------------------------------------------------------------------------------------------------------- gradients


class GradientGate(torch.autograd.Function):
    """The identity, as a view; backward runs a gate on the gradient, on the backend that forward chose (None: plain torch)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, threshold: Operand, gate: RegisteredGate, backend: str | None) -> Tensor:
        _keep(ctx, threshold, gate, backend)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (threshold,) = _joined(ctx.saved_tensors, ctx.numbers)
        if ctx.backend is None:
            return ctx.gate.reference(gradient, threshold), None, None, None
        with use_backend(ctx.backend):  # backward may run on another thread
            return ctx.gate(gradient, threshold), None, None, None


class TransformedGradientGate(torch.autograd.Function):
    """What torch.func transforms and forward-mode AD see; they reject the cheaper form above."""

    backward = GradientGate.backward

    @staticmethod
    def forward(input: Tensor, threshold: Operand, gate: RegisteredGate, backend: None) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[1:])

    @staticmethod
    def jvp(ctx: Any, input: Tensor, *rest: Any) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        threshold: Operand,
        gate: RegisteredGate,
        backend: None,
    ) -> tuple[Tensor, int]:
        """The output is batched if the threshold is: else its gradients would be added first and thresholded then."""
        batched, other = in_dims[:2]
        input = input.expand(info.batch_size, *input.shape) if batched is None else input.movedim(batched, 0)
        if other is not None:
            assert isinstance(threshold, Tensor)
            threshold = threshold.movedim(other, 0)
            if threshold.dim() == 1:
                threshold = threshold.to(input.dtype)  # as a 0-dim tensor is
            threshold = threshold.reshape(len(threshold), *[1] * (input.dim() - threshold.dim()), *threshold.shape[1:])
        return TransformedGradientGate.apply(input, threshold, gate, backend), 0  # type: ignore[no-untyped-call]


def _keep(ctx: Any, threshold: Operand, gate: RegisteredGate, backend: str | None) -> None:
    tensors, ctx.numbers = _parted((threshold,))
    ctx.save_for_backward(*tensors)
    ctx.gate, ctx.backend = gate, backend
