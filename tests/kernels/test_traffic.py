"""Bytes that the kernels move, counted by the interpreter, against the budgets of the design."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from triton_thresh.rules import Unweighted

from ..conftest import INTERPRETED
from ..gates import DIFFERENTIABLE, GATES, LEARNED, inputs, label
from ..interpreted.tools import Traffic, traffic
from ..rows import LEARNED_GATES, OPS, Gate, Loss, base_of, square

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts: TRITON_INTERPRET is not 1")

COLS, LOSS_BLOCK = 1024, 4096  # the interpreter's blocks: 8 * COLS elements of a gate, LOSS_BLOCK of a loss
LOSS_TILE = 1024  # of float64
SIZES = (8 * COLS, 8 * COLS + 1000)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CELLS = sorted({cell for op in OPS.values() if isinstance(op, Loss) for cell in op.cells}, key=str)
GRID = OPS["threshold_loss"]
SPANS = {"number": None, "0dim": (), "row": (8, 1), "column": (-1,), "element": (8, -1)}


class Arena:
    """Memory from which torch.empty and its kind are served, so that what a launcher allocates can be watched."""

    def __init__(self, size: int = 1 << 18) -> None:
        self.memory, self.used = torch.zeros(size, dtype=torch.uint8), 0

    @contextmanager
    def serves(self) -> Iterator[None]:
        with ExitStack() as patches:
            for name in ("empty", "empty_like", "empty_strided", "full"):
                patches.enter_context(patch.object(torch, name, self._served(getattr(torch, name))))
            yield

    def _served(self, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create(*arguments: Any, **options: Any) -> Tensor:
            made = stock(*arguments, **options)
            start, size = self.used, made.numel() * made.element_size()
            self.used += -(-size // 64) * 64
            own = self.memory[start : start + size].view(made.dtype)
            return own.as_strided(made.shape, made.stride(), own.storage_offset()).copy_(made)

        return create


@contextmanager
def watched(arena: Arena, **tensors: Tensor | None) -> Iterator[Traffic]:
    """Traffic by name; what the launcher made goes under "made"; anything else a kernel touches is an error."""
    with arena.serves(), traffic(made=arena.memory, **tensors) as moved:
        yield moved


def tiles(n: int, block: int) -> int:
    return -(-n // block)


def saved_bytes(op: Gate, n: int) -> int:
    """The bytes of the bits that forward writes, in whole tiles."""
    return {"bit": 1, "two bits": 2}.get(op.saves, 0) * tiles(n, 8 * COLS) * COLS


def gate_call(op: Gate, n: int, dtype: torch.dtype, spans: tuple[int, ...] | None) -> tuple[Tensor, Any, int]:
    """An input of n elements in 8 rows, a threshold, and the threshold's bytes."""
    x = inputs(0.5, dtype, (8, n // 8), torch.device("cpu"))
    if spans is None:
        return x, 0.5, 0
    t = torch.full([n // 8 if s < 0 else s for s in spans], 0.5, dtype=dtype)
    return x, t, t.numel() * t.element_size()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_gate(op: Gate, dtype: torch.dtype, n: int) -> None:
    """2s + 1/8 forward, 2s + 1/8 backward; two bits are 1/4; a gate that saves its input moves 3s backward."""
    x, threshold, _ = gate_call(op, n, dtype, None)
    once, mask, arena = n * dtype.itemsize, saved_bytes(op, n), Arena()
    g, numbers = torch.ones_like(x), 8 * len(op.example) if dtype == torch.float64 else 0  # which travel as tensors
    with watched(arena, x=x.requires_grad_(), g=g) as forward:
        y = op(x, threshold, *op.example[1:])
    assert (forward.loaded["x"], forward.stored) == (once, {"made": once + mask})
    assert forward.distinct("load", "made") == numbers
    with watched(arena, x=x, g=g) as backward:
        torch.autograd.grad(y, x, g)
    assert (backward.loaded["g"], backward.stored) == (once, {"made": once})
    assert backward.loaded["x"] == (once if op.saves == "input" else 0)
    assert backward.distinct("load", "made") == mask + (numbers if op.saves in ("input", "two bits") else 0)


@pytest.mark.parametrize(("op", "spans", "n"), square(DIFFERENTIABLE, list(SPANS.values()), SIZES), ids=label)
def test_gate_by_threshold(op: Gate, spans: tuple[int, ...] | None, n: int) -> None:
    """A broadcast threshold adds its distinct bytes, a per-element one its own size; a backward from one bit does not read it."""
    x, threshold, own = gate_call(op, n, torch.bfloat16, spans)
    once, mask, arena = n * 2, saved_bytes(op, n), Arena()
    g, t = torch.ones_like(x), threshold if isinstance(threshold, Tensor) else None
    with watched(arena, x=x.requires_grad_(), t=t, g=g) as forward:
        y = op(x, threshold, *op.example[1:])
    assert (forward.loaded["x"], forward.stored) == (once, {"made": once + mask})
    assert (forward.loaded["made"], forward.distinct("load", "t")) == (0, own)
    if spans == SPANS["element"]:
        assert forward.loaded["t"] == own
    with watched(arena, x=x, t=t, g=g) as backward:
        torch.autograd.grad(y, x, g)
    assert (backward.loaded["g"], backward.loaded["made"], backward.stored) == (once, mask, {"made": once})
    again = op.saves in ("input", "two bits")
    assert (backward.loaded["x"], backward.distinct("load", "t")) == (
        once if op.saves == "input" else 0,
        own if again else 0,
    )


@pytest.mark.parametrize(("op", "spans", "n"), square(GATES, list(SPANS.values()), SIZES), ids=label)
def test_gate_without_gradient(op: Gate, spans: tuple[int, ...] | None, n: int) -> None:
    """2s, and a per-element threshold's own size."""
    x, threshold, own = gate_call(op, n, torch.float32, spans)
    with watched(Arena(), x=x, t=threshold if isinstance(threshold, Tensor) else None) as moved:
        op(x, threshold, *op.example[1:])
    assert (moved.loaded["x"], moved.stored, moved.loaded["made"]) == (4 * n, {"made": 4 * n}, 0)
    assert moved.distinct("load", "t") == own


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", [op for op in GATES if op.inplace], ids=label)
def test_gate_inplace(op: Gate, n: int) -> None:
    x = inputs(0.5, torch.bfloat16, (n,), torch.device("cpu"))
    with watched(Arena(), x=x) as moved:
        op(x, *op.example, inplace=True)
    assert (moved.loaded, moved.stored) == ({"x": 2 * n}, {"x": 2 * n})


# ---------------------------------------------------------------------------------------------- gates whose threshold learns

MAIN = (torch.float32, torch.float64)  # bfloat16 comes with the other shapes
SHAPES = (  # a full block; two by two with three rows in the last; features that 16 does not divide
    (32, COLS),
    (35, 2 * COLS),
    (64, 1000),
)


def learned_call(op: Any, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """An input, a float32 threshold per feature, gradients of the outputs."""
    x = inputs(0.5, dtype, shape, torch.device("cpu"))
    with torch.no_grad():
        outputs = op(x, 0.5)
    gradients = [torch.ones_like(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return x.requires_grad_(), torch.full((shape[1],), 0.5, requires_grad=True), gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param(SHAPES[0], dtype, marks=() if dtype in MAIN else pytest.mark.matrix) for dtype in FLOATS]
    + [(shape, torch.bfloat16) for shape in SHAPES[1:]],
    ids=str,
)
@pytest.mark.parametrize("op", LEARNED + list(LEARNED_GATES.values()), ids=label)
def test_gate_that_learns(op: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """2s + 1/4 forward and backward, and no more than 1/2 for the threshold, the partial sums and the count."""
    x, t, gradients = learned_call(op, shape, dtype)
    n, wide = x.numel(), 8 if dtype == torch.float64 else 4
    once, counted = n * dtype.itemsize, len(gradients) > 1
    rows = -(-shape[0] // 8) * 8  # a byte of the mask holds eight
    mask = rows * shape[1] // 4
    named = {"x": x, "t": t, "g": gradients[0]} | ({"h": gradients[1]} if counted else {})
    arena = Arena(1 << 21)
    with watched(arena, **named) as forward:
        outputs = op(x, t)
    made = forward.loaded["made"] + forward.stored["made"]
    count = mask // 2 + shape[0] * wide if counted else 0  # one plane is read again
    assert (forward.loaded["x"], forward.loaded["t"]) == (once, rows * shape[1] // 2)
    assert once + mask + count <= made <= once + mask + count + 64 * shape[0]  # float64 numbers travel as tensors
    with watched(arena, **named) as backward:
        torch.autograd.grad(outputs, (x, t), gradients)
    sums = -(-shape[0] // 32) * shape[1] * wide
    read = backward.loaded.get("t", 0)
    assert (backward.loaded["g"], backward.stored) == (once, {"made": once + sums})
    assert mask <= backward.loaded["made"] <= mask + 64 * shape[0]
    assert read <= -(-shape[0] // 32) * shape[1] * 4
    if dtype != torch.float64 and rows == shape[0]:
        assert forward.loaded["t"] + count <= (0.5 + 0.125 * counted) * n + shape[0] * wide
        assert read + sums <= 0.5 * n


@pytest.mark.parametrize("op", LEARNED_GATES.values(), ids=label)
def test_gate_that_learns_without_gradient(op: Any) -> None:
    """2s; a count writes and reads one bit an element."""
    x, t, gradients = learned_call(op, SHAPES[0], torch.bfloat16)
    n, counted = x.numel(), len(gradients) > 1
    with torch.no_grad(), watched(Arena(1 << 21), x=x, t=t) as moved:
        op(x, t)
    assert moved.loaded["x"] == 2 * n
    assert moved.loaded["t"] == n / 2
    assert moved.stored == {"made": 2 * n + (n // 8 + 4 * x.shape[0] if counted else 0)}
    assert moved.loaded["made"] == (n // 8 if counted else 0)


@pytest.mark.slow
@pytest.mark.parametrize("op", LEARNED + list(LEARNED_GATES.values()), ids=label)
def test_threshold_per_element_that_learns(op: Any) -> None:
    """Its own size forward, and where backward needs it; its gradient's once."""
    x, _, gradients = learned_call(op, (32, 2 * COLS), torch.bfloat16)
    t = torch.full(x.shape, 0.5, requires_grad=True)
    named, n, arena = {"x": x, "t": t, "g": gradients[0]}, x.numel(), Arena(1 << 21)
    with watched(arena, **named) as forward:
        outputs = op(x, t)
    if len(gradients) > 1:
        named["h"] = gradients[1]
    with watched(arena, **named) as backward:
        torch.autograd.grad(outputs, (x, t), gradients)
    reads = op.reads_threshold
    assert (forward.loaded["x"], forward.loaded["t"]) == (2 * n, 4 * n)
    assert (backward.loaded["g"], backward.loaded["made"], backward.loaded.get("t", 0)) == (
        2 * n,
        n // 4,
        4 * n * reads,
    )
    assert backward.stored == {"made": 2 * n + 4 * n}


# -------------------------------------------------------------------------------------------------------------- losses


def sums(n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes a reduction loads and stores beside its elements: the partial sums, and the result."""
    partials = tiles(n, LOSS_BLOCK) * max(4, dtype.itemsize)
    return partials, partials + dtype.itemsize


def loss_call(n: int, dtype: torch.dtype, grad: bool = True) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad), x.detach().flip(0).round()


def check_reduction(cell: tuple[str, Any], dtype: torch.dtype, reduction: str, n: int) -> None:
    (base, rule), (x, y), arena = cell, loss_call(n, dtype), Arena()
    once, one = n * dtype.itemsize, torch.ones((), dtype=dtype)
    # float64 numbers travel as tensors, which each tile reads
    parameters = 8 * tiles(n, LOSS_TILE) * 4 if dtype == torch.float64 else 0
    added, written = sums(n, dtype)
    fused = dtype != torch.float16
    with watched(arena, x=x, y=y, one=one) as forward:
        made = rule() if rule is Unweighted else rule(0.5)
        loss = GRID(x, y, made, base=base_of(base), reduction=reduction)
    assert (forward.loaded["x"], forward.loaded["y"]) == (once, once)
    assert added <= forward.loaded["made"] <= added + parameters
    assert forward.stored == {"made": (once if fused else 0) + written}
    with watched(arena, x=x, y=y, one=one) as backward:
        torch.autograd.grad(loss, x, one)
    if fused:
        assert (set(backward.loaded), backward.stored) == ({"one"}, {})
        assert backward.most("load", "one") <= 8 * tiles(n, LOSS_BLOCK), "more than a scalar for every program"
    else:
        assert (backward.loaded["x"], backward.loaded["y"], backward.stored) == (once, once, {"made": once})


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}-{cell[1].__name__}")
def test_every_loss(cell: tuple[str, Any]) -> None:
    check_reduction(cell, torch.float32, "mean", SIZES[1])


@pytest.mark.parametrize("ignores", [False, True])
def test_options(ignores: bool) -> None:
    """A mask adds a byte an element, and one more to count it; counting targets reads them again; statistics add nothing."""
    n, dtype = SIZES[1], torch.float32
    x, y = loss_call(n, dtype)
    mask, arena = torch.arange(n) % 3 > 0, Arena()
    given = {"ignore_index": -1.0} if ignores else {}
    with watched(arena, x=x, y=y, mask=mask) as forward:
        GRID(x, y, mask=mask, return_stats=True, **given)
    assert forward.loaded["x"] == 4 * n
    assert forward.loaded["y"] == 4 * n * (2 if ignores else 1)
    assert forward.loaded["mask"] == 2 * n
    stored = 4 * n + tiles(n, LOSS_BLOCK) * (4 + 4 * 8) + 4 + 4 * 8
    assert stored <= forward.stored["made"] <= stored + 8 * tiles(n, LOSS_BLOCK)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str, dtype: torch.dtype, n: int) -> None:
    """3s forward and nothing backward for an upstream gradient of 1; float16: 2s forward, 3s backward."""
    check_reduction(CELLS[0], dtype, reduction, n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=label)
def test_rescaling_backward(dtype: torch.dtype, n: int) -> None:
    """2s for an upstream gradient other than 1: the buffer of the forward pass is scaled in place."""
    (base, rule), (x, y), arena = CELLS[0], loss_call(n, dtype), Arena()
    g = torch.full((), 3.0, dtype=dtype)
    with watched(arena, x=x, y=y):
        loss = GRID(x, y, rule(0.5), base=base_of(base))
    with watched(arena, x=x, y=y, g=g) as backward:
        torch.autograd.grad(loss, x, g)
    once = n * dtype.itemsize
    assert (backward.loaded["made"], backward.stored) == (once, {"made": once})
    assert set(backward.loaded) == {"made", "g"}
    assert backward.distinct("load", "g") == dtype.itemsize


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("reduction", "dtype"), list(itertools.product(["mean", "none"], FLOATS)), ids=label)
def test_loss_without_gradient(reduction: str, dtype: torch.dtype, n: int) -> None:
    """2s, or 3s without a reduction."""
    (base, rule), (x, y) = CELLS[0], loss_call(n, dtype, grad=False)
    once = n * dtype.itemsize
    with watched(Arena(), x=x, y=y) as moved:
        GRID(x, y, rule(0.5), base=base_of(base), reduction=reduction)
    assert (moved.loaded["x"], moved.loaded["y"]) == (once, once)
    assert moved.stored == {"made": once if reduction == "none" else sums(n, dtype)[1]}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
def test_loss_without_reduction(dtype: torch.dtype, n: int) -> None:
    """3s forward, 4s backward."""
    (base, rule), (x, y), arena = CELLS[0], loss_call(n, dtype), Arena()
    once, g = n * dtype.itemsize, torch.full((n,), 2.0, dtype=dtype)
    with watched(arena, x=x, y=y, g=g) as forward:
        loss = GRID(x, y, rule(0.5), base=base_of(base), reduction="none")
    assert (forward.loaded["x"], forward.loaded["y"], forward.stored) == (once, once, {"made": once})
    with watched(arena, x=x, y=y, g=g) as backward:
        torch.autograd.grad(loss, x, g)
    assert [backward.loaded[name] for name in "xyg"] == [once] * 3
    assert backward.stored == {"made": once}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("base", "rule"), CELLS[:1])
def test_operands_of_a_loss_add_their_own_size(base: str, rule: Any, n: int) -> None:
    """A target of another dtype and a weight per element are read as they are, once."""
    x, y = loss_call(n, torch.float32)
    target, weight = y.to(torch.uint8), torch.ones(n, dtype=torch.bfloat16)
    with watched(Arena(), x=x, target=target, weight=weight) as moved:
        GRID(x, target, rule(0.5), base=base_of(base), weight=weight)
    assert [moved.loaded[name] for name in ("x", "target", "weight")] == [4 * n, n, 2 * n]
