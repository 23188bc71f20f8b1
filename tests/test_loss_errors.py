"""Every error a loss promises: its type, its words, and that nothing of the caller's has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByLoss, ByPrediction, ByProximity
from triton_thresh.rules import Unweighted

from .losses import NAMED

X, Y = torch.rand(2, 3), torch.rand(2, 3)
META = torch.zeros(2, 3, device="meta")
LEAF = torch.rand(3, requires_grad=True)
SETTINGS = {ByPrediction: "threshold", ByProximity: "penalty_range", ByLoss: "penalty_factor"}

Call = Callable[..., Tensor]


def _calls() -> dict[str, Call]:
    """Every public loss as a function of input, target and keywords."""

    def named(op: str) -> Call:
        needs: dict[str, Any] = {} if NAMED[op].base != "mse" or NAMED[op].rule is ByLoss else {"threshold": 0.5}
        return lambda x, y, **keywords: getattr(tt, op)(x, y, **{**needs, **keywords})

    def grid(x: Any, y: Any, **keywords: Any) -> Tensor:
        return tt.threshold_loss(x, y, ByLoss(penalty_factor=keywords.pop("penalty_factor", 2.0)), **keywords)

    return {**{op: named(op) for op in NAMED}, "threshold_loss": grid}


CALLS = _calls()
every_op = pytest.mark.parametrize("op", CALLS)


def setting(op: str) -> str:
    """The name of one setting of an op's rule."""
    if op in NAMED and NAMED[op].rule is Unweighted:
        return {"focal": "gamma", "asymmetric": "eps"}[NAMED[op].base]
    return SETTINGS[NAMED[op].rule] if op in NAMED else "penalty_factor"


def raises(error: type[Exception], call: Callable[[], object], *words: str) -> None:
    """`call` raises `error` with all of `words`."""
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


@pytest.fixture(autouse=True)
def unchanged() -> Any:
    """The caller's tensors are what they were."""
    tensors = (X, Y, LEAF)
    before = [(t.detach().clone(), t._version, t.requires_grad) for t in tensors]
    yield
    for tensor, (value, version, requires_grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad, tensor.grad) == (version, requires_grad, None)


@every_op
@pytest.mark.parametrize("shape", [(3, 2), (3,), (1, 3), (2, 3, 1), ()], ids=str)
def test_shapes_of_input_and_target(op: str, shape: tuple[int, ...]) -> None:
    raises(ValueError, lambda: CALLS[op](X, torch.rand(shape)), op, "target", str(shape), "(2, 3)")


@every_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtype_of_the_input(op: str, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    raises(TypeError, lambda: CALLS[op](x, Y), op, "input", str(dtype), "float32", "bfloat16")


@every_op
@pytest.mark.parametrize("value", [None, 0.5, [0.5], "x"], ids=str)
def test_what_is_no_tensor(op: str, value: Any) -> None:
    raises(TypeError, lambda: CALLS[op](value, Y), op, "input", "tensor", type(value).__name__)
    raises(TypeError, lambda: CALLS[op](X, value), op, "target", "tensor", type(value).__name__)


@every_op
def test_complex_tensors(op: str) -> None:
    z = torch.ones(2, 3, dtype=torch.complex64)
    raises(TypeError, lambda: CALLS[op](X, z), op, "target", "complex64", "real")
    raises(TypeError, lambda: CALLS[op](X, Y, weight=z), op, "weight", "complex64", "real")
    raises(TypeError, lambda: CALLS[op](X, Y, **{setting(op): z}), op, setting(op), "complex64", "real")


@every_op
def test_sparse_tensors(op: str) -> None:
    raises(TypeError, lambda: CALLS[op](X.to_sparse(), Y), op, "input", "sparse", "strided")
    raises(TypeError, lambda: CALLS[op](X, Y.to_sparse()), op, "target", "sparse", "strided")
    raises(TypeError, lambda: CALLS[op](X, Y, weight=Y.to_sparse()), op, "weight", "sparse", "strided")


@every_op
@pytest.mark.parametrize("reduction", ["Mean", "avg", "", None, 1])
def test_reduction(op: str, reduction: Any) -> None:
    words = (op, "reduction", "'mean', 'sum', 'none'", repr(reduction))
    raises(ValueError, lambda: CALLS[op](X, Y, reduction=reduction), *words)


@every_op
def test_no_setting_may_require_grad(op: str) -> None:
    """Detached it would lose its gradient, so that the words name another way."""
    for argument in ("weight", setting(op)):
        words = (op, f"{argument} requires grad", f"{argument}.detach() would drop", "reduction='none'", "multiply")
        raises(ValueError, lambda argument=argument: CALLS[op](X, Y, **{argument: LEAF}), *words)
        with torch.no_grad():
            CALLS[op](X, Y, **{argument: LEAF})


@every_op
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 3), (2, 3, 1), (1, 2, 3)], ids=str)
def test_operands_that_do_not_broadcast(op: str, shape: tuple[int, ...]) -> None:
    for argument in ("weight", setting(op)):
        call = {argument: torch.rand(shape)}
        raises(ValueError, lambda call=call: CALLS[op](X, Y, **call), op, argument, str(shape), "(2, 3)", "broadcast")


@every_op
@pytest.mark.parametrize("value", ["0.5", [0.5], 1j, (1,), object], ids=str)
def test_operands_of_other_types(op: str, value: Any) -> None:
    for argument in ("weight", setting(op)):
        words = (op, argument, "number or a tensor", type(value).__name__)
        raises(TypeError, lambda argument=argument: CALLS[op](X, Y, **{argument: value}), *words)


@every_op
def test_a_setting_may_not_be_none(op: str) -> None:
    raises(TypeError, lambda: CALLS[op](X, Y, **{setting(op): None}), op, setting(op), "NoneType")


@every_op
def test_devices(op: str) -> None:
    raises(RuntimeError, lambda: CALLS[op](X, META), op, "target", "meta", "cpu")
    raises(RuntimeError, lambda: CALLS[op](META, Y), op, "target", "cpu", "meta")
    for argument in ("weight", setting(op)):
        for other in (META, META[0], META[0, 0]):
            operand = {argument: other}
            raises(RuntimeError, lambda operand=operand: CALLS[op](X, Y, **operand), op, argument, "meta", "cpu")


def test_pos_weight_goes_with_logits() -> None:
    for base in ("bce", "mse"):
        for pos_weight in (2.0, torch.rand(3)):
            keywords: Any = {"base": base, "pos_weight": pos_weight}
            words = ("threshold_loss", "pos_weight", "bce_with_logits", repr(base))
            raises(ValueError, lambda keywords=keywords: tt.threshold_loss(X, Y, ByLoss(), **keywords), *words)
    for op in ("threshold_bce_with_logits_loss", "threshold_loss"):
        call = CALLS[op]
        raises(ValueError, lambda call=call: call(X, Y, pos_weight=LEAF), "pos_weight requires grad")
        raises(ValueError, lambda call=call: call(X, Y, pos_weight=torch.rand(2)), "pos_weight", "(2,)", "(2, 3)")
        raises(TypeError, lambda call=call: call(X, Y, pos_weight="2"), "pos_weight", "str")
        raises(RuntimeError, lambda call=call: call(X, Y, pos_weight=META), "pos_weight", "meta")


@pytest.mark.parametrize("base", ["BCE", "l1", "", 3])
def test_unknown_base(base: Any) -> None:
    raises(ValueError, lambda: tt.threshold_loss(X, Y, ByLoss(), base=base), "threshold_loss", "'bce'", repr(base))


@pytest.mark.parametrize("rule", [0.7, "ByLoss", ByLoss, {"threshold": 0.5}], ids=str)
def test_rule_of_another_type(rule: Any) -> None:
    words = ("threshold_loss", "rule", "ByPrediction", "ByProximity", "ByLoss", getattr(rule, "__name__", str(rule)))
    raises(TypeError, lambda: tt.threshold_loss(X, Y, rule), *words)


def test_keywords_are_keywords() -> None:
    for call in (
        lambda: tt.threshold_bce_loss(X, Y, 0.7, 1.0, 0.1, 2.0),  # type: ignore[misc]
        lambda: tt.threshold_bce_loss(X, Y, pos_weight=2.0),  # type: ignore[call-arg]
        lambda: tt.threshold_mse_loss(X, Y),  # type: ignore[call-arg]
        lambda: tt.threshold_loss(X, Y, ByLoss(), "mse"),  # type: ignore[misc]
    ):
        with pytest.raises(TypeError, match=re.compile("argument")):
            call()


def test_errors_come_before_work_in_compiled_code() -> None:
    """A shape that is wrong is as wrong under torch.compile."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: tt.threshold_bce_loss(x, y))
    with pytest.raises(Exception, match=re.escape("(2, 3)")):
        compiled(X, Y[:1])
