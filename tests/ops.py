"""The ops of torch.library: the arguments that calls give them, and what both backends must show of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from triton_thresh import ByLoss, ByPrediction, ByProximity

from .calls import Case
from .losses import Cell
from .rows import LEARNED_GATES, OPS, ForeachGate, Gate, LearnedGate, Loss

OURS = torch.ops.triton_thresh
SHAPE = (6, 10)


class OpCall(NamedTuple):
    """An op with arguments."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Remembers which of the pack's ops are called within: a dispatch mode sees what a tracer does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "triton_thresh":
            self.calls.append(OpCall(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused() -> Iterator[Case]:
    """Every op that traced is one op; a loss with each kind of operand, reduction and way to its gradient."""
    yield Case(OPS["threshold_bce_with_logits_loss"], cell=Cell("bce_with_logits", ByPrediction))
    loss = OPS["threshold_loss"]
    yield Case(loss, "channel", cell=Cell("mse", ByLoss), reduction="none")
    yield Case(loss, "element", torch.float16, Cell("bce", ByProximity), "sum")
    for op in LEARNED_GATES.values():
        yield Case(op, "learned", torch.bfloat16 if op.name == "jumprelu" else torch.float32)
    yield Case(LEARNED_GATES["jumprelu_l0"])
    yield from (Case(op, "learned-element") for op in OPS.values() if isinstance(op, Gate) and op.learns)


FUSED = list(_fused())


def named_cases() -> Iterator[Case]:
    """Every op that has a name in the library, with numbers and with tensors."""
    for op in OPS.values():
        if isinstance(op, ForeachGate):
            continue
        cell = Cell(op.base, op.rule or ByProximity) if isinstance(op, Loss) else None
        yield Case(op, cell=cell)
        learns = isinstance(op, LearnedGate) or (isinstance(op, Gate) and op.learns)
        yield Case(op, "learned" if learns else "channel", cell=cell)


def named(case: Case, leaves: Sequence[Tensor]) -> OpCall:
    """The op of the case's name, with the arguments of its public function."""
    positional, keywords = case.arguments(*leaves)
    if isinstance(case.op, Loss):
        settings = () if case.kind == "number" else ("alpha", "gamma", "gamma_neg", "gamma_pos", "clip", "eps")
        for name in ("weight", "pos_weight", *settings):
            if name in keywords:
                keywords[name] = torch.as_tensor(keywords[name])
        if case.op.rule is None:
            *tensors, rule = positional
            positional = (*tensors, type(rule).__name__, list(vars(rule).values()))
    packet = getattr(OURS, case.op.name)
    return OpCall(packet.default if case.kind == "number" else packet.Tensor, positional, keywords)


def recorded(case: Case, device: torch.device) -> list[OpCall]:
    """What a call and its backward are when they are traced; the arguments are leaves again."""
    leaves = case.leaves(device, shape=SHAPE)
    with Recorder() as recorder:
        torch.autograd.grad(case(*leaves).sum(), leaves)
    forward = recorder.calls[0]

    def fresh(value: Any, call: OpCall) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad and call is forward)

    return [OpCall(call.op, *pytree.tree_map(lambda v, c=call: fresh(v, c), call[1:])) for call in recorder.calls]


def compiled(
    function: Callable[..., Any], backend: str = "aot_eager", **keywords: Any
) -> tuple[Any, CompileCounterWithBackend]:
    """The function compiled as one graph, and what counts and keeps its graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **keywords), counter


def held(graph: torch.fx.GraphModule) -> list[str]:
    """The names of the pack's ops in a graph."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name.removeprefix("triton_thresh.").split(".")[0] for name in names if name.startswith("triton_thresh.")]


def op_of(case: Case) -> str:
    """The op of the library that a case is in a graph."""
    return "loss" if isinstance(case.op, Loss) else "gate"


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)  # type: ignore[operator, no-any-return]
