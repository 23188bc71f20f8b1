"""What a call would do: backend, reason, block size and where it came from, bytes moved."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import functional, tuning
from .backend import is_plain, is_traced, use_backend
from .dispatch import chosen, chosen_for_many
from .families import ForeachGate, Gate, GradientGate, Loss, Op
from .foreach import check_parameters, check_thresholds
from .registry import OPS


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; ``print`` it.

    Bytes are those of the backend that runs. Those that torch moves on the eager backend nobody counts: they are None.

    Attributes:
        op: the op's name.
        backend: "triton" or "eager".
        reason: why that one.
        block: the elements a thread block covers (a gate's tile is 8 times that); None on the eager backend.
        num_warps: the warps of a thread block; None on the eager backend.
        block_source: "shipped table", "user cache", "search", "default" or "interpreter"; None on the eager backend.
        forward_bytes: bytes that the call's kernels move; None on the eager backend.
        backward_bytes: bytes that its backward's move, for an upstream gradient of 1; 0 if there is none; None likewise.
        saved_bytes: bytes of all tensors kept for backward, the caller's own among them, without what rounds the bits of a gate
            up to whole tiles; None under a compiler or a transform, which decides by itself.
    """

    op: str
    backend: str
    reason: str
    block: int | None
    num_warps: int | None
    block_source: str | None
    forward_bytes: int | None
    backward_bytes: int | None
    saved_bytes: int | None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        if self.block is not None:
            lines.append(f"  block {self.block}, {self.num_warps} warps ({self.block_source})")
        parts = []
        if self.forward_bytes is not None:
            parts.append(f"moves {self.forward_bytes:,} bytes forward, {self.backward_bytes:,} backward")
        if self.saved_bytes is not None:
            parts.append(f"saves {self.saved_bytes:,} bytes for backward")
        return "\n".join([*lines, f"  {'; '.join(parts)}"] if parts else lines)


def explain(name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say what the op `name` would do with these arguments, without running it.

    Args:
        name: an op of `ops()`.
        *args: what the public function of that name would be given.
        **kwargs: likewise.

    Returns:
        An `Explanation`.

    Raises:
        ValueError: for a name that is no op's. Arguments that the op would refuse are refused in the op's own words.

    Examples:
        >>> import torch, triton_thresh as tt
        >>> print(tt.explain("hardshrink", torch.randn(1024), 0.5))
        hardshrink: eager (auto: tensors on cpu run in eager torch)
          saves 0 bytes for backward
    """
    if name not in OPS:
        raise ValueError(f"explain: name must be one of {', '.join(OPS)}, got {name!r}")
    op = OPS[name]
    try:
        bound = inspect.signature(getattr(functional, name, op)).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}") from None
    bound.apply_defaults()
    arguments = bound.arguments
    if isinstance(op, ForeachGate):
        return _explain_foreach(op, arguments)
    input = arguments["input"]
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    settings = {k: v for a, b in arguments.items() for k, v in (vars(b) if is_dataclass(b) else {a: b}).items()}
    tensors = [v for v in settings.values() if isinstance(v, Tensor) and v is not input]
    saved = None
    if is_plain(input, *tensors):
        bound = _hollow(op, bound)
        saved = _saved_eagerly(op, bound)
    grad = torch.is_grad_enabled() and (input.requires_grad or any(t.requires_grad for t in tensors))
    backend, reason = chosen(op.tuning_key(arguments), input, grad and _saves(op))
    if not is_plain(input, *tensors):
        if op.shell(arguments) != "gate" and is_traced(input, *tensors):
            reason += "; traced as one op"
        else:
            backend, reason = "eager", "compiled, transformed or subclassed tensors run in plain torch"
    elif isinstance(op, Loss) and grad and arguments["target"].requires_grad:
        backend, reason = "eager", "a target that requires grad gets it through the formula in plain torch"
    if backend == "eager":
        return Explanation(name, backend, reason, None, None, None, None, None, saved)
    read = op.read(bound.arguments) if isinstance(op, Loss) else tensors
    forward, backward, saved = op.bytes_moved(input, read, arguments, grad=grad)
    searchable = op.searches(arguments)
    choice = tuning.choose(
        op.shell(arguments), op.tuning_key(arguments), input.dtype, input.numel(), input.device, searchable
    )
    source = choice.source
    if source == "default" and searchable and tuning.may_search():
        source = "default; the first call searches"
    config = choice.config
    return Explanation(name, backend, reason, config.block, config.num_warps, source, forward, backward, saved)


def _saves(op: Op) -> bool:
    """Whether a call saves for a backward of its own, and has a crossover for that."""
    return op.differentiable if isinstance(op, Gate) else not isinstance(op, GradientGate)


def _hollow(op: Op, bound: inspect.BoundArguments) -> inspect.BoundArguments:
    """The arguments, with tensors without memory for those on the input's device; raises for those on another."""
    input = bound.arguments["input"]

    def hollow(name: str, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{k: hollow(k, v) for k, v in vars(value).items()})
        if not isinstance(value, Tensor):
            return value
        if value is not input and not value.dim() and value.device.type == "cpu":  # a number
            return value
        if value.device != input.device:
            raise RuntimeError(f"{op.name}: {name} is on {value.device}, expected {input.device}, where the input is")
        empty = value.detach().to("meta").requires_grad_(value.requires_grad)
        return empty if value.is_leaf else empty.clone()

    made = {name: hollow(name, value) for name, value in bound.arguments.items()}
    return inspect.BoundArguments(bound.signature, OrderedDict(made))


def _saved_eagerly(op: Op, bound: inspect.BoundArguments) -> int:
    """The bytes that the eager backend saves for backward: makes the call, which raises what it would."""
    saved = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with use_backend("eager"), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        getattr(functional, op.name, op)(*bound.args, **bound.kwargs)
    return sum(saved)


def _explain_foreach(op: ForeachGate, arguments: Mapping[str, Any]) -> Explanation:
    """All gradients' bytes; the backend and block size of those that share dtype and device with the first."""
    parameters = arguments["parameters"]
    listed = check_parameters(op.name, parameters)
    check_thresholds(op.name, arguments["threshold"], len(listed))
    gradients = [p.grad for p in listed if p.grad is not None]
    operands = [t for t in [arguments["threshold"]] if isinstance(t, Tensor)]
    if not gradients:
        return Explanation(op.name, "eager", "no parameter has a gradient", None, None, None, None, None, 0)
    first = gradients[0]
    count = sum((g.dtype, g.device) == (first.dtype, first.device) for g in gradients)
    backend, reason = chosen_for_many(op.name, first.dtype, first.device, count)
    if not is_plain(first, *operands):
        backend, reason = "eager", "compiled, transformed or subclassed tensors run in plain torch"
    if backend == "eager":
        return Explanation(op.name, backend, reason, None, None, None, None, None, 0)
    moved = op.bytes_moved(gradients, operands, arguments, grad=False)
    numel = sum(g.numel() for g in gradients if (g.dtype, g.device) == (first.dtype, first.device))
    config, source = tuning.choose("gate", op.tuning_key(arguments), first.dtype, numel, first.device, False)
    return Explanation(op.name, backend, reason, config.block, config.num_warps, source, *moved)
