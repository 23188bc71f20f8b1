"""Every op with every feature of torch, in eager torch: the tests of the Triton path over again, then what traces, and modules.

Compiled, exported and traced calls run the reference, as transforms do.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import triton_thresh as tt

from .calls import Case
from .gates import same, upstream
from .kernels.test_features import *  # noqa: F403
from .kernels.test_features import (
    CALLS,
    SHAPE,
    agree,
    differentiable_calls,
    every_call,
    functional_calls,
    in_double,
    of_dtype,
    plain,
)
from .losses import Cell
from .on_eager import *  # noqa: F403 - fixtures
from .rows import GradientGate

ROOT = Path(__file__).parents[1]
GRID = ((Cell("bce_with_logits", tt.ByProximity), "sum"), (Cell("mse", tt.ByLoss), "none"))
ONE_EACH = [case for case in CALLS if case.kind == ("learned" if case.op.family == "learned" else "number")]
ONE_EACH += [case for case in CALLS if case.kind == "channel" and (case.cell, case.reduction) in GRID]
one_of_each = pytest.mark.parametrize("case", ONE_EACH, ids=str)


# ---------------------------------------------------------------------------------------------------------- transforms


def curvature(gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Each gradient's Jacobian by each leaf, a backward an element; 0 for a gradient that is constant."""

    def row(value: Tensor, leaf: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True)[0]

    return [torch.stack([row(v, leaf) for v in gradient]) for gradient in gradients for leaf in leaves]


@differentiable_calls
def test_func_jvp_and_forward_mode(case: Case, device: torch.device) -> None:
    """Pushed forward and pulled back, the Jacobian is one: <g, J v> = <J' g, v>; of threshold_grad J is the identity."""
    case, leaves = in_double(case, device)
    output, *gradients = plain(case, leaves)
    g = upstream(output, special=False)
    points = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.linspace(-1, 1, p.numel(), dtype=p.dtype, device=device).view_as(p) for p in points)
    value, pushed = torch.func.jvp(case, points, tangents)
    agree(case, value, output)
    if isinstance(case.op, GradientGate):
        same(pushed, tangents[0])
    else:
        pulled = sum((d * v).sum() for d, v in zip(gradients, tangents, strict=True))
        torch.testing.assert_close((g * pushed).sum(), pulled)
    with torch.autograd.forward_ad.dual_level():
        dual = case(*(torch.autograd.forward_ad.make_dual(p, v) for p, v in zip(points, tangents, strict=True)))
        value, tangent = torch.autograd.forward_ad.unpack_dual(dual)
    agree(case, value, output)
    agree(case, tangent, pushed)


@functional_calls
def test_func_vmap(case: Case, device: torch.device) -> None:
    """Over rows, over columns' worth of rows, nested; and gradients per sample."""
    case, leaves = in_double(case, device, (3, *SHAPE))
    x, *learned = (leaf.detach() for leaf in leaves)
    dims = (0, *[None] * len(learned))
    each = [case(row, *learned) for row in x]
    agree(case, torch.func.vmap(case, dims)(x, *learned), torch.stack(each))
    agree(case, torch.func.vmap(case, (1, *dims[1:]))(x.movedim(0, 1), *learned), torch.stack(each))
    nested = torch.func.vmap(torch.func.vmap(case, dims), dims)(x, *learned)
    agree(case, nested, torch.stack([torch.stack([case(row, *learned) for row in rows]) for rows in x]))
    if case.differentiable:
        every = tuple(range(len(dims)))
        per_sample = torch.func.vmap(torch.func.grad(lambda *points: case(*points).sum(), every), dims)(x, *learned)
        for i, row in enumerate(x):
            leaves = [t.clone().requires_grad_() for t in (row, *learned)]
            expected = torch.autograd.grad(case(*leaves).sum(), leaves)
            agree(case, tuple(part[i] for part in per_sample), expected)


@differentiable_calls
def test_func_jacobians(case: Case, device: torch.device) -> None:
    """jacrev, and where the derivative is that of the values, jacfwd; against one backward an output."""
    case, leaves = in_double(case, device, (5,))
    output = case(*leaves)
    rows = [
        torch.autograd.grad(output, leaves, one.view_as(output), retain_graph=True)
        for one in torch.eye(output.numel(), dtype=output.dtype, device=device)
    ]
    expected = tuple(torch.stack(each).view(*output.shape, -1) for each in zip(*rows, strict=True))
    points = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(points)))
    agree(case, torch.func.jacrev(case, every)(*points), expected)
    if not isinstance(case.op, GradientGate):
        agree(case, torch.func.jacfwd(case, every)(*points), expected)


@differentiable_calls
def test_func_hessian(case: Case, device: torch.device) -> None:
    """The curvature that double backward gives."""
    case, leaves = in_double(case, device, (4,))

    def total(*points: Tensor) -> Tensor:
        return (case(*points) ** 2).sum()

    gradients = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    expected = curvature(gradients, leaves)
    points = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(points)))
    for found in (
        torch.func.hessian(total, every)(*points),
        torch.func.jacrev(torch.func.jacrev(total, every), every)(*points),
    ):
        agree(case, [block for blocks in found for block in blocks], expected)


# ------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(c, "real", marks=() if c in ONE_EACH else pytest.mark.matrix) for c in CALLS]
    + [(c, "symbolic") for c in ONE_EACH],
    ids=str,
)
def test_make_fx(case: Case, mode: str, device: torch.device) -> None:
    """Forward and backward as a graph of torch's own ops, which gives on other numbers what the call gives."""
    leaves = case.leaves(device, shape=SHAPE)

    def both(*points: Tensor) -> list[Tensor]:
        fresh = [p.detach().requires_grad_() for p in points]
        output = case(*fresh)
        if not output.requires_grad:
            return [output]
        return [output, *torch.autograd.grad(output.sum(), fresh)]

    graph = make_fx(both, tracing_mode=mode)(*(leaf.detach() for leaf in leaves))
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function")) for name in called), called
    for seed in (0, 1):
        points = [leaf.detach() for leaf in case.leaves(device, seed, SHAPE)]
        agree(case, graph(*points), [each.detach() for each in both(*points)])


# ------------------------------------------------------------------------------------------- torch.compile and export


def test_compile_without_gradients_under_autocast() -> None:
    """A program of every loss. It makes its targets, and Inductor would not round those; tests/test_inductor.py has all else."""
    torch.compiler.reset()
    cases = [of_dtype(case, torch.bfloat16) for case in ONE_EACH if case.cell]
    calls = [case.__call__ for case in cases]
    compiled = torch.compile(lambda xs: [call(x) for call, x in zip(calls, xs)], fullgraph=True, backend="aot_eager")
    xs = [case.leaves(torch.device("cpu"), shape=SHAPE)[0] for case in cases]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for case, actual, x in zip(cases, compiled(xs), xs):
            agree(case, actual, case(x))


class Called(torch.nn.Module):
    """A call as a module; what learns is its parameter."""

    def __init__(self, case: Case, learned: Sequence[Tensor]) -> None:
        super().__init__()
        self.case, self.learned = case, torch.nn.ParameterList(learned)

    def forward(self, x: Tensor) -> Tensor:
        return self.case(x, *self.learned)


@one_of_each
def test_export(case: Case) -> None:
    """A program with a dynamic batch, saved, loaded and run at another size."""
    x, *learned = case.leaves(torch.device("cpu"), shape=(4, 6))
    module = Called(case, learned)
    program = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (4, 9):
        x = case.leaves(torch.device("cpu"), shape=(rows, 6))[0].detach()
        agree(case, loaded(x), module(x))


# ------------------------------------------------------------------------------------------------------- meta tensors


@every_call
def test_meta_tensors(case: Case) -> None:
    """Shapes, dtypes and layouts of outputs and gradients, without data."""
    leaves = case.leaves(torch.device("cpu"), shape=SHAPE)
    expected = plain(case, leaves)
    meta = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
    output = case(*meta)
    found = [output, *(torch.autograd.grad(output.sum(), meta) if output.requires_grad else ())]
    described = [(t.shape, t.dtype, t.stride()) for t in found]
    assert described == [(t.shape, t.dtype, t.stride()) for t in expected]
    assert all(t.is_meta for t in found)


# ------------------------------------------------------------------------------------------------------------ modules

CHANNELS = torch.tensor([0.25, 0.5, 0.75])


def drawn(bias: bool) -> torch.nn.Module:
    """The one module whose parameters are random: drawn alike each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tt.nn.LinearThresholdLoss(3, 3, bias=bias)


MODULES: dict[str, tuple[Callable[..., torch.nn.Module], ...]] = {
    "AsymmetricLoss": (tt.nn.AsymmetricLoss, lambda: tt.nn.AsymmetricLoss(CHANNELS.clone(), reduction="mean")),
    "BatchTopK": (lambda: tt.nn.BatchTopK(1.5), lambda: tt.nn.BatchTopK(2, momentum=0.5).eval()),
    "BinaryThreshold": (lambda: tt.nn.BinaryThreshold(0.5), lambda: tt.nn.BinaryThreshold(CHANNELS.clone(), 2.0)),
    "ExceedanceMSELoss": (tt.nn.ExceedanceMSELoss, lambda: tt.nn.ExceedanceMSELoss(CHANNELS.clone())),
    "Hardshrink": (tt.nn.Hardshrink, lambda: tt.nn.Hardshrink(CHANNELS.clone())),
    "JumpReLU": (lambda: tt.nn.JumpReLU(3, 0.5, 0.25), lambda: tt.nn.JumpReLU((4, 3), 0.5, input_gradient=True)),
    "LinearThresholdLoss": (lambda: drawn(True), lambda: drawn(False)),
    "ProximityMSELoss": (lambda: tt.nn.ProximityMSELoss(0.5), lambda: tt.nn.ProximityMSELoss(CHANNELS.clone())),
    "SigmoidFocalLoss": (
        lambda: tt.nn.SigmoidFocalLoss(reduction="mean"),
        lambda: tt.nn.SigmoidFocalLoss(CHANNELS.clone(), reduction="sum"),
    ),
    "Softshrink": (tt.nn.Softshrink, lambda: tt.nn.Softshrink(torch.nn.Parameter(CHANNELS.clone()))),
    "Threshold": (lambda: tt.nn.Threshold(0.5, 2.0), lambda: tt.nn.Threshold(CHANNELS.clone())),
    "ThresholdBCELoss": (tt.nn.ThresholdBCELoss, lambda: tt.nn.ThresholdBCELoss(CHANNELS.clone())),
    "ThresholdBCEWithLogitsLoss": (
        tt.nn.ThresholdBCEWithLogitsLoss,
        lambda: tt.nn.ThresholdBCEWithLogitsLoss(0.5, pos_weight=CHANNELS.clone()),
    ),
    "ThresholdLoss": (
        tt.nn.ThresholdLoss,
        lambda: tt.nn.ThresholdLoss(tt.ByOutcome(CHANNELS.clone()), tt.Focal(CHANNELS.clone())),
    ),
    "ThresholdMSELoss": (lambda: tt.nn.ThresholdMSELoss(0.5), lambda: tt.nn.ThresholdMSELoss(CHANNELS.clone())),
}
every_module = pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in tt.nn.__all__ for place in range(len(MODULES[name]))]
)


def data(module: torch.nn.Module) -> tuple[Tensor, ...]:
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    return (x, x.flip(0)) if type(module).__name__.endswith("Loss") else (x,)


@every_module
def test_modules_copied_and_stored(name: str, place: int) -> None:
    """Copies, pickles, torch.save, state_dict and functional_call keep results, types of state and repr."""
    module = MODULES[name][place]()
    expected = module(*data(module)).detach()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]
    twins.append(torch.load(buffer, weights_only=False))
    other = MODULES[name][place]()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other.load_state_dict(state)
    for twin in (*twins, other):
        same(twin(*data(module)).detach(), expected)
        assert repr(twin) == repr(module)
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in module.named_parameters()]
        assert [n for n, _ in twin.named_buffers()] == [n for n, _ in module.named_buffers()]
    same(torch.func.functional_call(other, state, data(module)).detach(), expected)
    ensemble = [MODULES[name][place]() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(ensemble)
    if parameters or buffers:
        inputs, stacked = data(module), {**parameters, **buffers}
        results = torch.func.vmap(lambda state: torch.func.functional_call(module, state, inputs))(stacked)
        torch.testing.assert_close(results.detach(), expected.expand(results.shape))


class Together(torch.nn.Module):
    """Modules side by side, each with inputs of its own."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList(modules)

    def forward(self, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        return [module(*values) for module, values in zip(self.each, inputs)]


@pytest.mark.slow
def test_modules_compiled() -> None:
    torch.compiler.reset()
    modules = [MODULES[name][1]() for name in tt.nn.__all__]
    inputs = [data(module) for module in modules]
    expected = [module(*values).detach() for module, values in zip(modules, inputs)]
    compiled = torch.compile(Together(copy.deepcopy(modules)), fullgraph=True)
    for name, actual, due in zip(tt.nn.__all__, compiled(inputs), expected):
        torch.testing.assert_close(actual.detach(), due, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", tt.nn.__all__)
def test_modules_exported(name: str) -> None:
    module = MODULES[name][1]()
    expected = module(*data(module)).detach()
    program = torch.export.export(module, data(module))
    torch.testing.assert_close(program.module()(*data(module)).detach(), expected)
    assert set(program.state_dict) == set(module.state_dict())


@every_module
def test_modules_of_zeros_on_meta(name: str, place: int) -> None:
    """Made on meta, then given memory and a state, as large models are."""
    module = MODULES[name][place]()
    late = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    late.load_state_dict(module.state_dict())
    same(late(*data(module)).detach(), module(*data(module)).detach())


def test_rules_and_ops_pickle() -> None:
    for rule in (tt.ByPrediction(), tt.ByProximity(0.5), tt.ByLoss()):
        assert pickle.loads(pickle.dumps(rule)) == rule
    for name, op in tt.ops().items():
        assert pickle.loads(pickle.dumps(getattr(tt, name))) is getattr(tt, name)
        assert pickle.loads(pickle.dumps(op)) == op


# ---------------------------------------------------------------------------------------------------------- processes

PROCESSES = """
import multiprocessing
import torch
import triton_thresh as tt

def work(seed):
    x = torch.linspace(-1, 1, 12).view(3, 4).roll(seed, 0).requires_grad_()
    tt.threshold_mse_loss(tt.jumprelu(tt.hardshrink(x), 0.2), x.detach() / 2, 0.5).backward()
    return x.grad.tolist()

if __name__ == "__main__":
    expected = [work(seed) for seed in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, range(4)) == expected
    print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_processes(tmp_path: Path) -> None:
    """Worker processes, forked after use, compute the same; tests/test_ddp.py spawns some."""
    script = tmp_path / "workers.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == "done", run.stderr
