"""One op from its pieces, registered twice: as an autograd.Function for eager calls, as an op of torch.library for traced ones.

An eager call through the dispatcher would cost 24 to 110 µs more; a compiler needs an op to see a fused kernel whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Operand, is_exporting

NAMESPACE = "triton_thresh"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _no_gradient(ctx: Any, *_: Tensor) -> Any:
    raise RuntimeError(f"{NAMESPACE}: an op of a backward pass has no gradient; differentiate the forward op twice")


def define(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, of_backward: bool = False
) -> Any:
    """An op without a gradient. Tensors reach the kernel with the strides that `fake` was shown: bits are read back by them."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if of_backward:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", _no_gradient, lib=_library)
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


def parted(values: Sequence[Operand]) -> tuple[Sequence[Any], list[Tensor]]:
    """Operands as a node keeps them: the values, with None for each tensor if there is one, and the tensors to save."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return [None if isinstance(value, Tensor) else value for value in values] if tensors else values, tensors


def restored(numbers: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Operand, ...]:
    """Operands that were parted."""
    supply = iter(tensors)
    return tuple([next(supply) if number is None else number for number in numbers])


class Fused:
    """An op with a gradient.

    The pieces share one list of arguments, which begins with tensors:

        forward(*arguments) -> outputs           a tuple, None for what is not wanted; what follows is for an eager setup
        setup(ctx, arguments, outputs)           saves for backward
        backward(ctx, *gradients) -> gradients   of the first arguments; the rest have none

    The op has `outputs` outputs. A caller gets the first `public` of them; the others are for backward. ctx.traced tells setup
    and backward how it was called. The op takes what its schema says, and so do the pieces that only traced calls need:

        decode(*flat) -> arguments    what the schema says, as `forward` takes it
        fake(*flat) -> outputs        empty tensors of the right shape, stride and dtype
        formula(*flat) -> outputs     the same in plain torch, for exported programs that are decomposed
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., tuple[Any, ...]],
        fake: Callable[..., tuple[Tensor, ...]],
        setup: Callable[..., None],
        backward: Callable[..., tuple[Tensor | None, ...]],
        decode: Callable[..., tuple[Any, ...]],
        formula: Callable[..., tuple[Tensor, ...]],
        outputs: int,
        public: int = 1,
    ) -> None:
        self._forward, self._setup, self._backward, self._decode = forward, setup, backward, decode
        self._public, self._outputs = public, outputs
        self._has_list = "Tensor?[]" in schema or "Tensor[]" in schema
        self.op = define(name, schema, self._kernel, fake)

        def decompose(*flat: Any) -> Any:
            return formula(*flat) if is_exporting() else NotImplemented

        # run_decompositions of an exported program puts this in the op's place. Torch asks wherever it traces; a compiler is to
        # keep the op, so it hears that there is none. With a kernel for CompositeImplicitAutograd Inductor refuses the op.
        self.op.decompose = decompose
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._backward_of_op, setup_context=self._setup_of_op, lib=_library
        )

        def record(ctx: Any, *arguments: Any) -> Any:
            outputs = forward(*arguments)
            ctx.traced = False
            setup(ctx, arguments, outputs)
            wanted = [output for output in outputs[:public] if output is not None]
            return wanted[0] if len(wanted) == 1 else tuple(wanted)

        def back(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            found = backward(ctx, *gradients)
            return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))

        pieces = {"forward": staticmethod(record), "backward": staticmethod(back)}
        function: Any = type(name.title(), (torch.autograd.Function,), pieces)
        self.record: Callable[..., Any] = function.apply

    def _kernel(self, *flat: Any) -> tuple[Tensor, ...]:
        outputs = self._forward(*self._decode(*flat))[: self._outputs]
        return tuple(flat[0].new_empty(0) if output is None else output for output in outputs)

    def _setup_of_op(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.traced = True
        # where an op has lists of tensors, torch wants a list of None for each list without a number; an empty list is one
        lists = [self._has_list and isinstance(value, (list, tuple)) for value in inputs]
        whole = [is_list and all(isinstance(v, Tensor) for v in value) for is_list, value in zip(lists, inputs)]
        ctx.nothing = [[None] * len(value) if is_whole else None for is_whole, value in zip(whole, inputs)]
        ctx.set_materialize_grads(False)
        self._setup(ctx, self._decode(*inputs), output)

    def _backward_of_op(self, ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = self._backward(ctx, *gradients[: self._public])
        return (*found, *ctx.nothing[len(found) :])
