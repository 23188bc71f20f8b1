"""Autograd over the shells: gates, learned gates, losses, gated gradients; and these as compilers and transforms see them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from . import layout, reference
from .backend import is_plain, use_backend
from .dispatch import launcher
from .reference import LossSpec, Surrogate
from .rules import Numbers, Operand

if TYPE_CHECKING:
    from .families import Gate as RegisteredGate
    from .launch import GateCall
    from .learned import LearnedCall


def _parted(operands: Sequence[Operand]) -> tuple[list[Tensor], Sequence[float | None]]:
    """The tensors among the operands, for save_for_backward, and the numbers, None where a tensor goes."""
    if type(operands) is Numbers:
        return [], operands
    tensors = [value for value in operands if isinstance(value, Tensor)]
    return tensors, [None if isinstance(value, Tensor) else value for value in operands]


def _joined(tensors: Sequence[Tensor], numbers: Sequence[float | None]) -> Sequence[Operand]:
    """The operands that `_parted` took apart."""
    if type(numbers) is Numbers:
        return numbers
    supply = iter(tensors)
    return [next(supply) if value is None else value for value in numbers]


# ----------------------------------------------------------------------------------------------------------------- gates


class Gate(torch.autograd.Function):
    """A gate on Triton: saves one bit per element."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: GateCall, inplace: bool) -> Tensor:
        output, mask = launcher("launch").gate_forward(call, input, input if inplace else None, want_mask=True)
        assert mask is not None
        ctx.save_for_backward(mask.bits)
        ctx.layout = mask[1:]
        if inplace:
            ctx.mark_dirty(input)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        launch = launcher("launch")
        (bits,) = ctx.saved_tensors
        mask = launch.Mask(bits, *ctx.layout)
        if torch.is_grad_enabled() or not is_plain(gradient):
            return torch.where(launch.unpack(mask), gradient, 0), None, None
        return launch.gate_backward(mask, gradient), None, None


# -------------------------------------------------------------------------------------------- gates whose threshold learns


class LearnedGate(torch.autograd.Function):
    """A gate with a threshold that learns, on Triton: saves two bits per element, one where only the input learns."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, threshold: Operand, lowered: tuple[LearnedCall, Operand], surrogate: Surrogate
    ) -> Any:
        ctx.call, compared = lowered
        bits = 2 if ctx.needs_input_grad[1] or ctx.call.input_gradient else 1
        output, count, codes = launcher("learned").forward(ctx.call, compared, input, bits)
        assert codes is not None
        (packed, *ctx.layout), ctx.pattern = codes
        ctx.surrogate, ctx.number = surrogate, 0.0 if isinstance(threshold, Tensor) else threshold
        if isinstance(threshold, Tensor):
            ctx.shape, ctx.dtype = threshold.shape, threshold.dtype
        reads = isinstance(threshold, Tensor) and ctx.call.reads_threshold
        ctx.save_for_backward(packed, *([threshold] if reads else []))
        return output if count is None else (output, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        launch, learned = launcher("launch"), launcher("learned")
        bits, *thresholds = ctx.saved_tensors
        mask, call = launch.Mask(bits, *ctx.layout), ctx.call
        threshold = thresholds[0] if thresholds else ctx.number
        learns = ctx.needs_input_grad[1]
        if torch.is_grad_enabled() or not is_plain(*gradients):
            low = launch.unpack(mask)
            high = launch.unpack(mask, 1) if learns or call.input_gradient else torch.zeros_like(low)
            dx, each = reference.pull(ctx.surrogate, gradients, (low, high), threshold, gradients[0].dtype)
            dt = layout.summed(each, ctx.shape) if learns else None
        else:
            codes = learned.Codes(mask, ctx.pattern)
            dx, dt = learned.backward(call, threshold, codes, gradients, ctx.shape if learns else None)
        return dx, dt if dt is None else dt.to(ctx.dtype), None, None


class TracedLearnedGate(torch.autograd.Function):
    """The same in plain torch, its codes recomputed in backward: what compilers see."""

    @staticmethod
    def forward(input: Tensor, threshold: Operand, surrogate: Surrogate) -> Any:
        output = surrogate.value(input, threshold, *surrogate.constants)
        if not surrogate.counts:
            return output
        return output, reference.counted(reference.is_above(input, threshold), input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, threshold, ctx.surrogate = inputs
        tensors, ctx.numbers = _parted([threshold])
        ctx.save_for_backward(input, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in gradients):
            return None, None, None
        input, *tensors = ctx.saved_tensors
        (threshold,) = _joined(tensors, ctx.numbers)
        codes = ctx.surrogate.codes(input, threshold, *ctx.surrogate.constants)
        dx, dt = reference.pull(ctx.surrogate, gradients, codes, threshold, input.dtype)
        if not isinstance(threshold, Tensor) or not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, layout.summed(dt, threshold.shape).to(threshold.dtype), None


class TransformedLearnedGate(TracedLearnedGate):
    """What torch.func transforms and forward-mode AD see; torch.compile traces neither a vmap rule nor a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        TracedLearnedGate.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *_parted(inputs[1:2])[0])  # not ctx.to_save, which vmap has unwrapped
        ctx.dtypes = [o.dtype for o in (output if isinstance(output, tuple) else (output,))]

    @staticmethod
    def jvp(ctx: Any, input: Tensor | None, threshold: Tensor | None, _: None) -> Any:
        x, *tensors = ctx.saved_tensors
        (t,) = _joined(tensors, ctx.numbers)
        found = reference.tangents(ctx.surrogate, x, t, input, threshold)
        outputs = tuple(tangent.to(dtype) for tangent, dtype in zip(found, ctx.dtypes))
        return outputs if len(outputs) > 1 else outputs[0]


def plain_learned_gate(surrogate: Surrogate, input: Tensor, threshold: Operand) -> Any:
    """A gate with a threshold that learns in plain torch, for whoever sees through the call."""
    if _is_program():
        return reference.straight_through(surrogate, input, threshold)
    function = TracedLearnedGate if torch.compiler.is_compiling() else TransformedLearnedGate
    return function.apply(input, threshold, surrogate)  # type: ignore[no-untyped-call]


def _is_program() -> bool:
    """Whether what runs becomes a program that holds no autograd.Function: traced by torch.jit.trace, or exported."""
    return is_tracing() or torch.compiler.is_exporting()


# ---------------------------------------------------------------------------------------------------------------- losses


class Loss(torch.autograd.Function):
    """A loss on either backend (`shell`: the module launch or eager), its gradient computed in the forward pass where sound.

    The gradient buffer belongs to this node alone. The first backward scales it in place and hands it on; later ones
    recompute from the saved inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, spec: LossSpec, operands: Sequence[Operand], shell: ModuleType
    ) -> Tensor:
        fused = reference.is_fused(spec.reduction, input.dtype)
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_slope(ctx) * gradient).to(ctx.saved_tensors[0].dtype), None, None, None


def plain_loss(spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand]) -> Tensor:
    """A loss in plain torch, for whoever sees through the call."""
    if _is_program():
        return reference.loss(spec, input, target, operands)
    if torch.compiler.is_compiling():
        loss = TracedLoss.apply(input, target, spec, operands)  # type: ignore[no-untyped-call]
        return reference.reduced(loss, spec)
    return reference.loss_in_ops(spec, input, target, operands)


def _slope(ctx: Any) -> Tensor:
    input, target, *tensors = ctx.saved_tensors
    return reference.element_slope(ctx.spec, input, target, _joined(tensors, ctx.numbers))


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
        return input.clone()  # batched forward-mode AD takes no view

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[1:])

    @staticmethod
    def jvp(ctx: Any, input: Tensor, *rest: Any) -> Tensor:
        return input.clone()

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
