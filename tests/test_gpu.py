"""What only a real GPU can show: the host never waits, graphs replay, streams hold, memory and bits stay what they were.

tests/kernels runs the matrix of values on the device; here every op of the registry runs once with each kind of operand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByPrediction, tuning
from triton_thresh.registry import OPS, Gate, Loss

from .gates import DIFFERENTIABLE, equal, gradient, label, same
from .losses import CELLS, SETTINGS, SLACK, Cell, Setup, assert_near, inputs, name, setup, truth

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SHAPE = (37, 1003)  # several tiles and a tail, and nothing divisible by 16
KINDS = ("number", "cpu", "mean", "channel", "element")
EDGE = 2**31
PERIOD = 2**26 - 5  # of the data beyond EDGE: an offset that wraps around meets other values
ACCURACY_COUNT = 10**7
PEAK_COUNT = 2**24 + 77
MIB = 2**20
PEAK_SLACK = 4 * MIB  # the allocator leaves up to 1 MiB of a block unsplit


@dataclass(frozen=True)
class Case:
    """An op with a kind of operand. Operands are made on the device inside the call; what learns is a leaf."""

    op: Gate | Loss
    kind: str = "number"
    dtype: torch.dtype = torch.float32
    cell: Cell | None = None
    reduction: str = "mean"

    def __str__(self) -> str:
        own = (f"{self.cell!r}-{self.reduction}",) if self.cell else ()
        return "-".join((self.op.name, *own, str(self.dtype).removeprefix("torch."), self.kind))

    def leaves(self, seed: int = 0, shape: tuple[int, ...] = SHAPE, device: torch.device = DEVICE) -> list[Tensor]:
        """The input, and the threshold if it learns."""
        x = inputs(self.cell.base if self.cell else "mse", shape, self.dtype, seed).to(device).requires_grad_()
        if not self.kind.startswith("learned"):
            return [x]
        assert isinstance(self.op, Gate)
        return [x, self.operand(self.op.example[0], x).requires_grad_()]

    def operand(self, value: float, x: Tensor) -> Any:
        """A threshold, weight or factor near `value`."""
        span = (0.8 * value, 1.25 * value)
        if self.kind == "cpu":
            return torch.tensor(value)
        if self.kind == "mean":
            return x.detach().mean() + value
        if self.kind == "learned-0dim":
            return torch.full((), value, device=x.device)
        if self.kind in ("channel", "learned"):
            return torch.linspace(*span, x.shape[-1], device=x.device)
        if self.kind == "element":
            return torch.linspace(*span, x.numel(), device=x.device).view_as(x)
        return value

    def arguments(self, x: Tensor, *learned: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the public function is called with."""
        if isinstance(self.op, Gate):
            threshold = learned[0] if learned else self.operand(self.op.example[0], x)
            inplace = {"inplace": True} if self.kind == "inplace" else {}
            return (x * 1 if inplace else x, threshold, *self.op.example[1:]), inplace
        assert self.cell
        y = torch.linspace(0, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
        rule = self.cell.rule(*(self.operand(value, x) for value in SETTINGS[self.cell.rule]))
        keywords = {"weight": self.operand(0.75, x), "reduction": self.reduction}
        if self.cell.base == "bce_with_logits":
            keywords["pos_weight"] = self.operand(1.5, x)
        if self.op.rule is None:
            return (x, y, rule), {**keywords, "base": self.cell.base}
        return (x, y), {**keywords, **vars(rule)}

    def __call__(self, *leaves: Tensor) -> Tensor:
        positional, keywords = self.arguments(*leaves)
        output: Tensor = getattr(tt, self.op.name)(*positional, **keywords)
        return output


def _cases() -> Iterator[Case]:
    for op in OPS.values():
        if isinstance(op, Gate):
            more = (("learned", "learned-0dim") if op.learned else ()) + (("inplace",) if op.inplace else ())
            yield from (Case(op, kind) for kind in KINDS + more)
            yield Case(op, dtype=torch.bfloat16)
        elif isinstance(op, Loss):
            for cell in (Cell(*cell) for cell in op.cells):
                yield from (Case(op, kind, cell=cell) for kind in (KINDS if op.rule is None else KINDS[:1]))
                yield Case(op, cell=cell, dtype=torch.float16)
                yield Case(op, cell=cell, reduction="none")
        else:
            raise NotImplementedError(f"no GPU cases of {op}")


CASES = list(_cases())
PLAIN = [case for case in CASES if case.kind == "number" and case.dtype == torch.float32]
GRID = OPS["threshold_loss"]
SUMMED = [case for case in CASES if case.kind.startswith("learned")] + [
    Case(GRID, cell=cell, reduction=reduction) for cell in CELLS for reduction in ("mean", "sum")
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
plain_cases = pytest.mark.parametrize("case", PLAIN, ids=str)
cells = pytest.mark.parametrize("cell", CELLS, ids=name)


@pytest.fixture(autouse=True)
def _triton_with_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path))
    tuning.cached.cache_clear()
    with tt.use_backend("triton"):
        yield
    tuning.cached.cache_clear()


def step(case: Case, leaves: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Forward and backward: the output and the gradients, for the upstream gradient `scale`."""
    output = case(*leaves)
    if not output.requires_grad:
        return [output]
    upstream = scale.to(output.dtype).expand_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same tensors, bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        same(a, b)


def three(device: torch.device = DEVICE) -> Tensor:
    """An upstream gradient that is not 1."""
    return torch.full((), 3.0, device=device)


# ------------------------------------------------------------------------------------------- host, graphs, streams, guards


@contextmanager
def no_host_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_the_host_never_waits(case: Case) -> None:
    leaves, scale = case.leaves(), three()
    expected = step(case, leaves, scale)  # compiles, and searches for the block size
    with no_host_wait():
        actual = step(case, leaves, scale)
    all_same(actual, expected)


def test_a_host_that_waits_is_noticed() -> None:
    x = three()
    with no_host_wait(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


def captured(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a captured call, and the tensors that a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


@every_case
def test_graph_replay_equals_eager_mode(case: Case) -> None:
    leaves, scale = case.leaves(), three()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(case, leaves, scale)
    torch.cuda.current_stream().wait_stream(side)
    replay, outputs = captured(lambda: step(case, leaves, scale))
    for seed, factor in ((1, 1.0), (2, 0.5), (3, 3.0)):
        with torch.no_grad():
            for leaf, fresh in zip(leaves, case.leaves(seed), strict=True):
                leaf.copy_(fresh)
        scale.fill_(factor)
        replay()
        all_same(outputs, step(case, leaves, scale))


def test_no_search_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OPS["hardshrink"])
    leaves, scale = case.leaves(), three()
    monkeypatch.setattr(tuning, "shipped", lambda device: {})
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    expected = step(case, leaves, scale)  # compiles the default
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE")
    searched = []
    monkeypatch.setattr(tuning, "search", lambda configs, launch: searched.append(configs) or configs[0])
    replay, outputs = captured(lambda: step(case, leaves, scale))
    replay()
    all_same(outputs, expected)
    assert not searched
    step(case, leaves, scale)
    assert len(searched) == 1, "the search that was put off is made up for"


@every_case
def test_side_stream(case: Case) -> None:
    """A kernel on any other stream would read the input before it is written."""
    leaves, scale = case.leaves(), three()
    expected = step(case, leaves, scale)
    late = case.leaves(seed=1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for leaf, fresh in zip(late, leaves, strict=True):
                leaf.copy_(fresh)
        actual = step(case, late, scale)
    torch.cuda.current_stream().wait_stream(side)
    all_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_a_gpu_that_is_not_the_current_one(case: Case) -> None:
    other = torch.device("cuda", 1)
    leaves, scale = case.leaves(device=other), three(other)
    with torch.cuda.device(other):
        expected = step(case, leaves, scale)
    with torch.cuda.device(0):
        actual = step(case, leaves, scale)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == other for tensor in actual)
    all_same(actual, expected)


# ---------------------------------------------------------------------------------------------------------------- backward


@every_case
def test_backward_again_and_accumulation(case: Case) -> None:
    leaves, scale = case.leaves(), three()
    output = case(*leaves)
    if not output.requires_grad:
        pytest.skip("no gradient")
    before = [leaf.detach().clone() for leaf in leaves]
    upstream = scale.to(output.dtype).expand_as(output)
    output.backward(upstream, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    output.backward(upstream)
    case(*leaves).backward(upstream)
    for leaf, first, untouched in zip(leaves, once, before, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * first)
        assert torch.equal(leaf, untouched)


@cells
@pytest.mark.parametrize("autocast", [True, False])
def test_grad_scaler(cell: Cell, autocast: bool) -> None:
    """float16 gradients of a mean over 2**18 elements: scaled by 1/N before the factor arrives, they would be denormal."""
    case = setup(cell, torch.float16, DEVICE, shape=(2**18,))
    n, factor = (
        case.input.numel(),
        2.0**16 if autocast else 2.0**10,
    )  # a float16 loss holds no upstream gradient of 2**16
    weights = torch.nn.Parameter(case.input.float())
    optimizer = torch.optim.SGD([weights], lr=n)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=factor)
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        loss = case("mean", weights.to(torch.float16))
    assert loss.dtype == (torch.float32 if autocast else torch.float16)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert weights.grad is not None
    expected = truth(case)
    scaled = (weights.grad * factor).half()  # exact: factors are powers of 2
    assert_near(scaled, expected.slope * factor / n, expected.slope_size * factor / n)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == factor, "an infinity was found"
    assert not torch.equal(weights, case.input.float())


@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_a_hundred_runs_give_the_same_bits(case: Case) -> None:
    leaves, scale = case.leaves(shape=(1025, 1023)), three()
    expected = step(case, leaves, scale)
    for _ in range(100):
        all_same(step(case, leaves, scale), expected)


# ----------------------------------------------------------------------------------------------------- large tensors, memory


def filled(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """n elements that repeat with PERIOD."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    pattern = torch.randn(min(n, PERIOD), generator=generator, device=DEVICE).to(dtype)
    made = torch.empty(n, dtype=dtype, device=DEVICE)
    for part in made.split(PERIOD):
        part.copy_(pattern[: part.numel()])
    return made


def windows(n: int) -> list[slice]:
    """The start, both sides of EDGE, the end."""
    return [slice(0, 5000), slice(EDGE - 2500, min(EDGE + 2500, n)), slice(n - 5000, n)]


def need_memory(gib: int = 40) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free, {gib} are needed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("hardshrink", torch.bfloat16, "number"),
        ("hardshrink", torch.bfloat16, "channel"),
        ("hardshrink", torch.bfloat16, "int8 element"),
        ("softshrink", torch.bfloat16, "learned"),
        ("threshold", torch.int8, "number"),
    ],
    ids=str,
)
def test_gate_beyond_32_bit_offsets(name: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_memory()
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    op = OPS[name]
    assert isinstance(op, Gate)
    columns = 1027
    rows = EDGE // columns + 9
    n = rows * columns
    x = filled(n, dtype, 0).view(rows, columns).requires_grad_(dtype.is_floating_point)
    threshold: Any = 1 if dtype == torch.int8 else 0.5
    if kind == "channel":
        threshold = torch.linspace(0, 1, columns, device=DEVICE)
    elif kind == "int8 element":
        threshold = filled(n, torch.int8, 2).abs_().view(rows, columns)
    elif kind == "learned":
        threshold = torch.full((), 0.5, device=DEVICE, requires_grad=True)
    output = getattr(tt, name)(x, threshold)
    g = filled(n, torch.bfloat16, 1).view(rows, columns) if x.requires_grad else None
    dx = torch.autograd.grad(output, x, g)[0].view(-1) if g is not None else None
    for window in windows(n):
        part, t = x.detach().view(-1)[window], threshold
        if kind == "channel":
            t = threshold[torch.arange(window.start, window.stop, device=DEVICE) % columns]
        elif kind == "int8 element":
            t = threshold.view(-1)[window]
        elif kind == "learned":
            t = threshold.detach()
        equal(output.detach().view(-1)[window], op.reference(part, t))
        if g is not None and dx is not None:
            equal(dx[window], gradient(op, part, t, g=g.view(-1)[window]))


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [-1, 12345])
def test_loss_at_and_beyond_32_bit_offsets(beyond: int) -> None:
    need_memory()
    n = EDGE + beyond
    x, y = filled(n, torch.bfloat16, 0).requires_grad_(), filled(n, torch.bfloat16, 1)
    rule = ByPrediction(*SETTINGS[ByPrediction])
    with torch.autocast(DEVICE.type, torch.bfloat16):  # for a loss in float32
        loss = tt.threshold_mse_loss(x, y, **vars(rule))
    (3 * loss).backward()
    assert x.grad is not None

    def expected(part: slice) -> Any:
        return truth(Setup(Cell("mse", ByPrediction), x.detach()[part], y[part], rule))

    sums = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    for start in range(0, n, 2**25):
        there = expected(slice(start, start + 2**25))
        sums += torch.stack([there.loss.sum(), there.loss_size.sum()])
    assert_near(loss.detach(), *(sums / n).unbind(), terms=n)
    for window in windows(n):
        there = expected(window)
        assert_near(x.grad[window], there.slope * 3 / n, there.slope_size * 3 / n, roundings=2)


def peak(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most memory in use during a call beyond that in use before it, and the result."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
@pytest.mark.parametrize("elementwise", [False, True])
def test_peak_of_a_gate(op: Gate, elementwise: bool) -> None:
    x = torch.randn(PEAK_COUNT, device=DEVICE).bfloat16().requires_grad_()
    g = torch.ones_like(x)
    threshold = torch.rand_like(x).detach() if elementwise else 0.5
    arguments = (threshold, *op.example[1:])
    getattr(tt, op.name)(x, *arguments)  # searches
    used, output = peak(lambda: getattr(tt, op.name)(x, *arguments))
    assert used <= 2 * PEAK_COUNT + PEAK_COUNT / 8 + PEAK_SLACK
    used, _ = peak(lambda: torch.autograd.grad(output, x, g))
    assert used <= 2 * PEAK_COUNT + PEAK_SLACK


@cells
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name)
def test_peak_of_a_loss(cell: Cell, dtype: torch.dtype) -> None:
    """Forward and backward: one gradient buffer and the partial sums; what backward hands on is that buffer."""
    case = setup(cell, dtype, DEVICE, shape=(PEAK_COUNT,))
    x = case.input.requires_grad_()
    torch.autograd.grad(3 * case("mean", x), x)  # compiles

    def both() -> int | None:
        loss = case("mean", x)
        assert loss.grad_fn is not None
        buffer = loss.grad_fn.saved_tensors[-1]  # type: ignore[attr-defined]
        pointer = buffer.data_ptr() if dtype != torch.float16 else None
        del buffer
        (3 * loss).backward()
        return pointer

    used, pointer = peak(both)
    assert used <= dtype.itemsize * PEAK_COUNT + 4 * PEAK_COUNT // 1024 + PEAK_SLACK
    assert x.grad is not None
    assert pointer is None or x.grad.data_ptr() == pointer


# --------------------------------------------------------------------------------------------------------------- accuracy


def spread_logits(u: Tensor, v: Tensor) -> Tensor:
    """Logits: random ones, wide ones, any magnitude a float32 has, and hard ones."""
    parts = [8 * u - 4, 240 * u - 120, (2 * u - 1).sign() * 10 ** (76 * v - 38)]
    hard = torch.tensor([0.0, -0.0, 1e-45, 20.0, 88.0, 88.8, 103.9, 104.1, 3.4e38], dtype=torch.float64, device=DEVICE)
    return torch.cat([*(part[i::3] for i, part in enumerate(parts)), hard, -hard]).float()


def spread_probabilities(u: Tensor, v: Tensor) -> Tensor:
    """Probabilities: random ones, ones near 0 down to denormals, ones near 1, and hard ones."""
    parts = [u, 10 ** (-44 * v), 1 - 10 ** (-7.2 * v)]
    hard = torch.tensor([0.0, 1.0, 1e-45, 1e-12, 2**-24, 1 - 2**-24, 0.5], dtype=torch.float64, device=DEVICE)
    return torch.cat([*(part[i::3] for i, part in enumerate(parts)), hard]).float().clamp(0, 1)


@pytest.mark.parametrize("base", ["bce", "bce_with_logits"])
def test_no_less_exact_than_torch_at_ten_million_inputs(base: str) -> None:
    """The worst error in float32, of the loss and of the gradient, is that of torch plus SLACK units in the last place.

    It is measured in units of the summed magnitudes of the terms (`truth`): for bce that is the relative error. Of logits
    also the absolute error up to 30, and that of a gradient s to a label of 0 relative to s (1 + |x|), as an exp2 of a
    rounded product has it. Denormal results may be flushed.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    u, v, z = torch.rand(3, ACCURACY_COUNT, generator=generator, dtype=torch.float64, device=DEVICE)
    x = (spread_probabilities if base == "bce" else spread_logits)(u, v).requires_grad_()
    y = (3 * z - 1).clamp(0, 1).float()  # soft labels, and as many of 0 and of 1
    y = torch.cat([y, (torch.arange(x.numel() - y.numel(), device=DEVICE) % 2).float()])
    case = Setup(Cell(base, ByPrediction), x.detach(), y, ByPrediction(0.0, 1.0, 1.0))
    torch_loss = F.binary_cross_entropy if base == "bce" else F.binary_cross_entropy_with_logits
    ours, theirs = case("none", x), torch_loss(x, y, reduction="none")
    (our_slope,), (their_slope,) = (torch.autograd.grad(loss.sum(), x) for loss in (ours, theirs))
    expected = truth(case)
    info = torch.finfo(torch.float32)

    def check(actual: Tensor, other: Tensor, exact: Tensor, size: Tensor | float, where: Tensor | None = None) -> None:
        def worst(tensor: Tensor) -> float:
            error = (tensor.detach().double() - exact).abs() - info.smallest_normal
            measured = torch.where(error <= 0, 0.0, error / size)  # 0 / 0 is no error, NaN is one
            return float((measured if where is None else measured[where]).max())

        assert worst(actual) <= worst(other) + SLACK * info.eps

    check(ours, theirs, expected.loss, expected.loss_size)
    check(our_slope, their_slope, expected.slope, expected.slope_size)
    if base == "bce_with_logits":
        magnitude = x.detach().double().abs()
        check(ours, theirs, expected.loss, 1.0, magnitude <= 30)
        check(our_slope, their_slope, expected.slope, 1.0)
        check(our_slope, their_slope, expected.slope, expected.slope.abs() * (1 + magnitude), y == 0)


# ----------------------------------------------------------------------------------------------- backend, search, compiler


@plain_cases
def test_auto_takes_triton(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_thresh import launch

    ran: list[str] = []
    for function in ("gate_forward", "loss_forward"):
        run = getattr(launch, function)
        monkeypatch.setattr(launch, function, lambda *a, run=run, **k: ran.append(run.__name__) or run(*a, **k))
    leaves = case.leaves(shape=(4096, 1024))
    with tt.use_backend("auto"):
        output = case(*leaves)
        positional, keywords = case.arguments(*leaves)
        explanation = tt.explain(case.op.name, *positional, **keywords)
    assert ran == [f"{case.op.family}_forward"]
    assert output.device.type == DEVICE.type
    assert (explanation.backend, explanation.reason) == ("triton", "auto: tensors on cuda run on Triton")
    assert explanation.block_source in ("search", "shipped table", "user cache", "default")


SEARCH = """
import torch, triton_thresh as tt
from triton_thresh import tuning
tuning.shipped = lambda device: {}
x = torch.randn(4096, device="cuda")
tt.hardshrink(x)
print(tt.explain("hardshrink", x).block_source)
"""


def test_a_search_is_remembered_on_disk(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_THRESH_AUTOTUNE"}
    environment.update(TRITON_THRESH_CACHE_DIR=str(tmp_path), TRITON_THRESH_BACKEND="triton")
    for source in ("search", "user cache"):
        done = subprocess.run([sys.executable, "-c", SEARCH], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == source
        (file,) = tmp_path.iterdir()
        assert list(json.loads(file.read_text())["entries"]) == ["hardshrink/float32/12"]


@pytest.mark.parametrize("op", ["hardshrink", "threshold_mse_loss"])
def test_inductor(op: str) -> None:
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    arguments = (0.5,) if op == "hardshrink" else (torch.rand(SHAPE, device=DEVICE), 0.4)
    function = getattr(tt, op)
    torch._dynamo.reset()
    actual = torch.compile(lambda x: function(x, *arguments), fullgraph=True)(x)
    expected = function(x, *arguments)
    torch.testing.assert_close(actual, expected)
    slopes = [torch.autograd.grad(3 * output.sum(), x)[0] for output in (actual, expected)]
    torch.testing.assert_close(*slopes)
