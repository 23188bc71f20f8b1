"""torch.ops.triton_thresh in eager torch, and what compilers see on a CPU, where losses and gates are formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import triton_thresh as tt
from triton_thresh import backend

from .calls import Case, all_same
from .gates import same, upstream
from .kernels.test_features import agree, outcome, plain
from .ops import FUSED, OURS, SHAPE, Called, compiled, held, named, named_cases
from .rows import OPS, ForeachGate

CPU = torch.device("cpu")
NAMED = list(named_cases())
every_fused = pytest.mark.parametrize("case", FUSED, ids=str)
every_named = pytest.mark.parametrize("case", NAMED, ids=str)


@pytest.fixture(autouse=True)
def eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield


# ------------------------------------------------------------------------------------------------------------ named ops


def flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Several outputs as Case gives them."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([output[0].flatten(), *(o.to(output[0].dtype).flatten() for o in output[1:])])


def by_name(case: Case, *leaves: Tensor) -> Tensor:
    op, args, kwargs = named(case, leaves)
    return flat(op(*args, **kwargs))


def test_every_op_has_a_name() -> None:
    assert {case.op.name for case in NAMED} == {op.name for op in OPS.values() if not isinstance(op, ForeachGate)}
    for case in NAMED:
        assert set(getattr(OURS, case.op.name).overloads()) == {"default", "Tensor"}


@every_named
def test_named_ops_are_the_functions(case: Case) -> None:
    leaves = case.leaves(CPU, shape=SHAPE)
    all_same(outcome(by_name(case, *leaves), leaves), plain(case, leaves))


@pytest.mark.parametrize("case", [case for case in NAMED if case.differentiable], ids=str)
def test_named_ops_under_transforms(case: Case) -> None:
    leaves = case.leaves(CPU, shape=SHAPE)
    points = [leaf.detach() for leaf in leaves]
    gradient = torch.func.grad(lambda *points: by_name(case, *points).sum(), tuple(range(len(points))))
    agree(case, gradient(*points), torch.autograd.grad(case(*leaves).sum(), leaves))
    rows = (0, *[None] * (len(points) - 1))
    expected = torch.func.vmap(case, rows)(*points)
    agree(case, torch.func.vmap(lambda *points: by_name(case, *points), rows)(*points), expected)


# A call of each op, in turn with numbers and with tensors.
SOME = [pytest.param(case, marks=() if i // 2 % 2 == i % 2 else pytest.mark.matrix) for i, case in enumerate(NAMED)]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME, ids=str)
def test_opcheck_of_named_ops(case: Case) -> None:
    records = case.kind != "channel"
    opcheck(*named(case, [leaf.detach().requires_grad_(records) for leaf in case.leaves(CPU, shape=SHAPE)]))


def test_named_ops_in_a_compiled_and_an_exported_program() -> None:
    def program(x: Tensor) -> Tensor:
        kept = OURS.hardshrink(OURS.threshold_grad(x, 0.3), 0.2)
        return (
            OURS.threshold_loss(kept, x.detach() / 2, "ByLoss", [0.5, 2.0], base="mse")
            + OURS.jumprelu(x, x[0])[0].sum()
        )

    x = (upstream(torch.zeros(SHAPE), special=False) / 8).requires_grad_()
    call, counter = compiled(program)
    all_same(outcome(call(x), [x]), outcome(program(x), [x]))
    assert counter.frame_count == 1
    exported = torch.export.export(Called(program), (x.detach(),)).module()
    same(exported(x.detach()), program(x.detach()))


def test_rules_of_the_named_grid() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of 'ByPrediction', .*'ByLoss', got 'ByMood'"):
        OURS.threshold_loss(torch.ones(2), torch.ones(2), "ByMood", [1.0])


def test_numbers_of_named_ops_keep_their_bits() -> None:
    """Integers beyond float64's, infinities and NaN."""
    x = torch.tensor([2**60, 2**60 + 1, 2**60 + 2])
    same(OURS.binary_threshold(x, 2**60 + 1), tt.binary_threshold(x, 2**60 + 1))
    x = torch.tensor([-torch.inf, 0.0, torch.nan, torch.inf])
    for value in (torch.inf, torch.nan):
        same(OURS.hardshrink(x, value), tt.hardshrink(x, value))
        same(
            OURS.threshold_mse_loss(x, x, value, reduction="none"), tt.threshold_mse_loss(x, x, value, reduction="none")
        )


# --------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("threshold", [[0.5], [0.5, 0.25], torch.tensor(0.5), torch.tensor([0.5, 0.25])], ids=repr)
def test_opcheck_of_gradients_in_place(threshold: list[float] | Tensor) -> None:
    gradients = [torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-1, 1, 5)]
    op = OURS.threshold_gradients_.Tensor if isinstance(threshold, Tensor) else OURS.threshold_gradients_.default
    opcheck(op, ([g.clone() for g in gradients], threshold), {"return_kept": True})
    parameters = [torch.zeros_like(g) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    one = threshold[0] if isinstance(threshold, list) and len(threshold) == 1 else threshold
    kept = tt.threshold_gradients_(parameters, one, return_kept=True)
    versions = [g._version for g in gradients]
    found = OURS.threshold_gradients_(gradients, threshold, return_kept=True)
    assert all(g._version > before for g, before in zip(gradients, versions, strict=True))
    all_same([found, *gradients], [kept, *(p.grad for p in parameters)])
    assert OURS.threshold_gradients_(gradients, threshold).numel() == 0


@every_fused
def test_on_a_cpu_compilers_see_formulas(case: Case) -> None:
    points = [leaf.detach() for leaf in case.leaves(CPU, shape=SHAPE)]
    assert held(make_fx(case)(*points)) == []


# -------------------------------------------------------------------------------------------------------- a GPU's tensors


def model(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Every kind of op, of no gradient: of fake tensors of a GPU the autograd of a CPU's torch records none."""
    kept, count = tt.jumprelu_l0(tt.hardshrink(x, 0.25), t, 0.5)
    return tt.threshold_mse_loss(kept, y, 0.5) + count.mean() + tt.proximity_mse_loss(x, y, t, reduction="none").sum()


@pytest.mark.skipif(not backend.has_triton(), reason="on a GPU without Triton formulas run")
@pytest.mark.parametrize("how", ["make_fx", "export", "strict", "compile"])
def test_graphs_of_a_gpu_hold_the_ops(how: str) -> None:
    with FakeTensorMode(), tt.use_backend("auto"):
        inputs = tuple(torch.empty(*shape, device="cuda") for shape in (SHAPE, SHAPE, SHAPE[1:]))
        rows = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}, {})
        if how == "make_fx":
            graph = make_fx(model)(*inputs)
        elif how == "compile":
            call, counter = compiled(model)
            assert call(*inputs).device.type == "cuda"
            (graph,) = counter.graphs
        else:
            strict = how == "strict"
            assert (
                held(torch.export.export(Called(model), inputs, strict=strict, dynamic_shapes=(rows,)).graph_module)
                == []
            )
            with tt.use_backend("triton"):
                program = torch.export.export(Called(model), inputs, strict=strict, dynamic_shapes=(rows,))
            assert held(program.run_decompositions().graph_module) == []
            graph = program.graph_module
    assert held(graph) == ["gate", "loss", "loss"]
