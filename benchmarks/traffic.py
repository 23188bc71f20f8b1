"""Bytes that a training step moves, counted and not timed: the formula in eager torch, the same compiled, and this.

eager: every torch call that autograd makes reads its operands and writes its results; views move nothing, caches are ignored.
compiled: what Inductor says that its fused kernels read and write, when it compiles the same formula for a CPU.
this: the byte formulas of the registry, to which the tests hold the Triton kernels in the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.run import DTYPES
from benchmarks.workloads import WHOLE, Call, Inputs, Workload, run, workloads
from triton_thresh.registry import OPS

NUMEL = 1 << 22  # 64 rows of 65,536 features where thresholds learn
FEW = 1 << 13  # 8 tensors where there are many: a thousand would take minutes to compile


@dataclass(frozen=True)
class Traffic:
    """Bytes an element, forward and backward together (forward alone where there is no backward).

    compiled: torch.compile of the formula, whose backward is autograd's. compiled_grad: torch.compile of
    torch.func.grad_and_value(formula), for losses; None elsewhere. Where an op takes many tensors, it is compiled for a few.
    """

    op: str
    dtype: str
    eager: float
    compiled: float | None
    compiled_grad: float | None
    this: float
    torch: str


class Calls(TorchDispatchMode):
    """Notes each torch call with the bytes it reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            creates = name.endswith("_like") or name.startswith("new_")
            read = [] if creates else [value for key, value in (kwargs or {}).items() if key != "out"] + list(args)
            self.seen.append((name, sum(map(_size, tree_leaves((read, result))))))
        return result


def _size(value: object) -> int:
    """A tensor's bytes; an expanded one is as large as what it was expanded from."""
    if not isinstance(value, torch.Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def eager_calls(workload: Workload) -> list[tuple[str, float]]:
    """The eager formula's calls in order, each with its bytes an element."""
    inputs = workload.make(0)
    with Calls() as calls:
        run(workload.eager, inputs, workload.modes[-1])
    return [(name, size / workload.numel) for name, size in calls.seen]


def compiled_bytes(call: Call, inputs: Inputs, mode: str) -> int:
    """The bytes that the kernels of Inductor read and write, for a call and its backward."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    total = 0
    compile_to_module = GraphLowering.compile_to_module

    def counting(graph: GraphLowering) -> Any:
        nonlocal total
        module = compile_to_module(graph)
        total += graph.count_bytes()[0]
        return module

    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), patch.object(GraphLowering, "compile_to_module", counting):
        run(torch.compile(call, fullgraph=True, dynamic=False), inputs, mode)
    return total


def count(workload: Workload) -> Traffic:
    """The bytes of one op."""
    mode = workload.modes[-1]
    few = workload
    if not workload.compiles:
        (few,) = workloads(workload.op, workload.dtype, FEW, workload.device)

    def compiled(call: Call | None, mode: str) -> float | None:
        return round(compiled_bytes(call, few.make(0), mode) / few.numel, 2) if call else None

    return Traffic(
        op=workload.name,
        dtype=str(workload.dtype).removeprefix("torch."),
        eager=round(sum(size for _, size in eager_calls(workload)), 2),
        compiled=compiled(few.eager, mode),
        compiled_grad=compiled(few.whole, WHOLE),
        this=round(workload.bytes[mode] / workload.numel, 2),
        torch=torch.__version__,
    )


def count_all(ops: Sequence[str] = (), dtypes: Sequence[str] = DTYPES) -> Iterator[Traffic]:
    """Every op of the registry, or those named."""
    for dtype in dtypes:
        for name in ops or OPS:
            for workload in workloads(OPS[name], getattr(torch, dtype), NUMEL, torch.device("cpu")):
                yield count(workload)


def read(path: Path) -> list[Traffic]:
    """The lines that `write` wrote."""
    return [Traffic(**line) for line in json.loads(path.read_text())]


def write(found: Sequence[Traffic], path: Path) -> None:
    """A list of objects, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(one)) for one in found) + "\n]\n")
