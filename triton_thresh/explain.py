"""Says how a call would go: backend, reason, block size and where it came from, bytes moved."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import gates, gradients, losses
from .backend import Plan, use_backend
from .functional import function_of
from .registry import OPS, Gate, Loss


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; ``print`` it.

    Bytes are those of the backend that runs. Those that torch moves on the eager backend nobody counts: they are None.

    Attributes:
        op: the op's name.
        backend: "triton", "eager" or "inductor".
        reason: why that one.
        block: the elements a thread block covers (a gate's tile is 8 times that); None on the eager backend.
        num_warps: the warps of a thread block; None on the eager backend.
        block_source: "user's table", "search", "default" or "interpreter"; None on the eager backend.
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
    function = function_of(op)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}") from None
    bound.apply_defaults()
    plan = _planned(op, bound.arguments)
    if plan.way == "triton":
        return Explanation(name, *plan)
    saved = _saved_eagerly(function, bound) if plan.way == "eager" else None
    name_of = "inductor" if plan.way == "inductor" else "eager"
    return Explanation(name, name_of, plan.reason, None, None, None, None, None, saved)


def _planned(op: Any, arguments: dict[str, Any]) -> Plan:
    """The plan of the op's family."""
    input, *rest = arguments.values()
    if isinstance(op, Gate):
        names = list(gates.SIGNATURES[op.name])
        if not isinstance(input, Tensor):
            raise TypeError(f"{op.name}: input must be a tensor, got {type(input).__name__}")
        keywords = {name: value for name, value in arguments.items() if name in gates.KEYWORDS}
        return gates.plan(op, input, *(arguments[name] for name in names), **keywords)
    if isinstance(op, Loss):
        return _planned_loss(op, arguments)
    if op.many:
        return gradients.plan_many(op.name, input, rest[0])
    return gradients.plan_one(op.name, input, rest[0])


def _planned_loss(op: Loss, arguments: dict[str, Any]) -> Plan:
    names = ("weight", "pos_weight", "mask", "ignore_index", "divisor", "label_smoothing", "reduction", "return_stats")
    options = {name: arguments[name] for name in names if name in arguments}
    base: Any = arguments.get("base")
    rule = arguments.get("rule")
    if op.rule is not None:
        base, rule = (
            kind(**{name: arguments[name] for name in inspect.signature(kind).parameters if name in arguments})
            for kind in (op.base, op.rule)
        )
        options.pop("pos_weight", None)  # which the base has
    return losses.plan(op.name, arguments["input"], arguments["target"], base, rule, **options)


def _saved_eagerly(function: Callable[..., Any], bound: inspect.BoundArguments) -> int:
    """The bytes that the eager backend saves for backward: makes the call, on tensors without memory."""
    saved = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    input = next(iter(bound.arguments.values()))
    if not isinstance(input, Tensor):  # the gradients of many parameters, in place
        return 0

    def hollow(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{name: hollow(held) for name, held in vars(value).items()})
        if not isinstance(value, Tensor) or (value is not input and not value.dim() and value.device.type == "cpu"):
            return value
        empty = value.detach().to("meta").requires_grad_(value.requires_grad)
        return empty if value.is_leaf else empty.clone()

    arguments = {name: hollow(value) for name, value in bound.arguments.items()}
    made = inspect.BoundArguments(bound.signature, OrderedDict(arguments))
    with use_backend("eager"), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        function(*made.args, **made.kwargs)
    return sum(saved)
