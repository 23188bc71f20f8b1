"""Gates on compiled PTX: op x dtype x operand, forward and backward; full tiles and a tail in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import triton_thresh as tt

from .. import gates, gradients, learned
from ..gates import GATES, OPERANDS, Case, Layout, Operand, label
from ..kernels import test_foreach as foreach_tests
from ..kernels import test_gates as gate_tests
from ..kernels import test_learned as learned_tests
from ..kernels import test_select as select_tests
from ..rows import OPS, ForeachGate, Gate, GradientGate, LearnedGate
from .sample import case, sampled, some

pytestmark = pytest.mark.usefixtures("compiled")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = Layout("whole", lambda x: x, (4, 3, 17, 23))
KINDS = [operand for operand in OPERANDS if operand.name in ("number", "0dim", "c11", "nchw")]


def by_name(value: object) -> str | None:
    return label(value) or getattr(value, "name", None)


def _gates() -> Iterator[Any]:
    for (place, op), (kind, operand) in itertools.product(enumerate(GATES), enumerate(KINDS)):
        for other, dtype in enumerate(op.dtypes):
            kept = (place + other + kind) % len(KINDS) == 0 and (place + kind) % 2 == 0
            yield case(kept and (dtype.is_floating_point or op.name == "binary_threshold"), op, dtype, operand)


@pytest.mark.parametrize(("op", "dtype", "operand"), list(_gates()), ids=by_name)
def test_gate(op: Gate, dtype: torch.dtype, operand: Operand, device: torch.device) -> None:
    gate_tests.test_case(Case(op, dtype, operand, WHOLE), device)


EDGES = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -0.5, 1e-3, 6e4, -6e4)


@pytest.mark.parametrize("dtype", FLOATS, ids=by_name)
def test_softshrink_at_infinities_and_zeros(dtype: torch.dtype, device: torch.device) -> None:
    """Triton's interpreter keeps a NaN that a minimum drops on every GPU."""
    x, t = (edges.to(dtype) for edges in torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)).unbind(1))
    x, t = x.contiguous().to(device), t.contiguous().to(device)
    for threshold in (t, 0.0, -0.0, torch.inf):
        y = tt.softshrink(x, threshold)
        with tt.use_backend("eager"):
            expected = tt.softshrink(x, threshold)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        whole = ~expected.isnan()
        assert torch.equal(y.signbit()[whole], expected.signbit()[whole])


def _learned() -> Iterator[Any]:
    """Each op in bfloat16: forward with and without a gradient, backward and the count are four kernels."""
    for (place, op), (other, dtype), (kind, operand) in itertools.product(
        *map(enumerate, (learned.OPS, FLOATS, KINDS))
    ):
        yield case((place + other + kind) % len(KINDS) == 0 and other == 1, op, dtype, operand)


@pytest.mark.parametrize(("op", "dtype", "operand"), list(_learned()), ids=by_name)
def test_learned(op: LearnedGate, dtype: torch.dtype, operand: Operand, device: torch.device) -> None:
    """The count of a row, too."""
    made = learned.Case(op, dtype, operand, WHOLE)
    learned.check(made, device, input_gradient=operand.name == "number", special=True)


@pytest.mark.parametrize("operand", some(KINDS[1:], lambda operand: operand.name == "c11"), ids=by_name)
@pytest.mark.parametrize("op", gates.LEARNED, ids=by_name)
def test_threshold_that_learns(op: Gate, operand: Operand, device: torch.device) -> None:
    gate_tests.test_gradient_of_the_threshold(op, WHOLE, operand, device)


@pytest.mark.parametrize(("op", "dtype", "operand"), sampled(gradients.GRADIENT_GATES, FLOATS, KINDS), ids=by_name)
def test_gradient(op: GradientGate, dtype: torch.dtype, operand: Operand, device: torch.device) -> None:
    foreach_tests.test_case(op, Case(op.gate, dtype, operand, WHOLE), device)


THRESHOLDS = (0.5, torch.nan, torch.tensor(0.1), list(gradients.THRESHOLDS))


@pytest.mark.parametrize(("op", "dtype", "threshold"), sampled(gradients.FOREACH, FLOATS, THRESHOLDS), ids=by_name)
def test_many_gradients(op: ForeachGate, dtype: torch.dtype, threshold: Any, device: torch.device) -> None:
    """At every alignment."""
    foreach_tests.run(op, threshold, dtype, device)
    foreach_tests.run(op, threshold, dtype, device, return_kept=True)


def test_features_that_fired(device: torch.device) -> None:
    select_tests.test_fired((100, 16), torch.float32, device)


@pytest.mark.parametrize("op", some(learned.OPS, lambda op: op.name == "jumprelu_l0"), ids=by_name)
@pytest.mark.parametrize("shape", [(70, 33), case(False, (1, 1)), case(False, (40, 130))], ids=by_name)
def test_sizes_of_rows(op: LearnedGate, shape: tuple[int, ...], device: torch.device) -> None:
    """Several blocks of 32 rows and of columns, and tails of each."""
    learned_tests.test_sizes(op, shape, device)


SPECIAL = (1e-41, torch.nan, -0.0, 65519.0)


@pytest.mark.parametrize(
    ("number", "op"), [case(t != t, t, OPS[n]) for t in SPECIAL for n in ("threshold", "hardshrink")], ids=by_name
)
def test_special_numbers(op: Gate, number: float, device: torch.device) -> None:
    gate_tests.test_numbers(op, number, device)


@pytest.mark.parametrize("dtype", some(gate_tests.INTEGERS, lambda dtype: dtype == torch.int8), ids=by_name)
def test_integers_are_compared_by_value(dtype: torch.dtype, device: torch.device) -> None:
    """With numbers beyond their range, too."""
    for t in (300, -(10**30), 254.5, torch.nan):
        gate_tests.test_binary_threshold_compares_integers_by_value(t, dtype, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=by_name)
def test_integers_against_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    """Rounded by way of float32, as torch does: from there the integer is a tie, which is even 67108864."""
    x = torch.full((20,), (257 << 18) + 1, dtype=dtype)
    t = torch.full((20,), float(256 << 18), dtype=torch.bfloat16)
    assert tt.binary_threshold(x, t).tolist() == [0] * 20 == OPS["binary_threshold"].reference(x, t).tolist()


@pytest.mark.parametrize("operand", [o for o in OPERANDS if o.name in ("c11-float32", "nchw-float64")], ids=by_name)
@pytest.mark.parametrize("op", [OPS["hardshrink"], case(False, OPS["jumprelu"])], ids=by_name)
def test_thresholds_wider_than_the_input(op: Any, operand: Operand, device: torch.device) -> None:
    """Compared as they are, not rounded to bfloat16."""
    if isinstance(op, LearnedGate):
        learned.check(learned.Case(op, torch.bfloat16, operand, WHOLE), device, input_gradient=False, special=False)
    else:
        gate_tests.test_case(Case(op, torch.bfloat16, operand, WHOLE), device)
