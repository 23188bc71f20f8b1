"""The registry's rows as tests use them: each can be called, and knows its reference and what follows from its fields."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from triton_thresh import gates, reference, registry
from triton_thresh.bases import BASES
from triton_thresh.functional import function_of
from triton_thresh.registry import KEEP_LARGE
from triton_thresh.rules import RULES


@dataclass(frozen=True)
class Op:
    """A row, called as its public function or, where it has none yet, through its family."""

    row: Any
    function: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.row, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _AnyGate(Op):
    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)  # type: ignore[no-any-return]

    @property
    def differentiable(self) -> bool:
        return bool(self.saves != "nothing")

    @property
    def selects(self) -> bool:
        """True if dy/dx is 0 or 1."""
        return self.saves in ("nothing", "bit") or self.straight_through

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(gates.SIGNATURES[self.name])

    @property
    def constants(self) -> tuple[str, ...]:
        return self.names[self.operands :]


class Gate(_AnyGate):
    """A gate with a fixed threshold, or one that learns without an estimate."""

    family = "gate"


class LearnedGate(_AnyGate):
    """A gate whose threshold learns by a straight-through estimate."""

    family = "learned"


class Loss(Op):
    """A loss."""

    family = "loss"

    @property
    def base(self) -> str:
        return self.row.base.snake_name()  # type: ignore[no-any-return]

    @property
    def cells(self) -> list[tuple[str, type[Any]]]:
        return [(base.snake_name(), rule) for base, rule in self.row.cells]


@dataclass(frozen=True)
class _AnyGradientGate(Op):
    gate: Any


class GradientGate(_AnyGradientGate):
    """A gate over the gradient of a tensor."""

    family = "gradient"


class ForeachGate(_AnyGradientGate):
    """A gate over the gradients of many parameters."""

    family = "foreach"


def _gate(row: registry.Gate) -> Any:
    return (LearnedGate if row.straight_through else Gate)(row, function_of(row))


def _op(row: registry.Op) -> Any:
    if isinstance(row, registry.Gate):
        return _gate(row)
    if isinstance(row, registry.Loss):
        return Loss(row, function_of(row))
    return (ForeachGate if row.many else GradientGate)(row, function_of(row), _gate(row.gate))


OPS: Mapping[str, Any] = {name: _op(row) for name, row in registry.OPS.items()}
LEARNED_GATES: Mapping[str, Any] = {name: op for name, op in OPS.items() if isinstance(op, LearnedGate)}
GATES: Mapping[str, Any] = {name: op for name, op in OPS.items() if isinstance(op, Gate)}
KEEP = _gate(KEEP_LARGE)
BASE_NAMES: Mapping[str, type[Any]] = {base.snake_name(): base for base in BASES}
RULE_CLASSES: Sequence[type[Any]] = RULES


def base_of(name: str) -> Any:
    """A base by its name, with the operands of its example; the named ones as users give them, by their strings."""
    kind = BASE_NAMES[name]
    return name if name in ("bce", "bce_with_logits", "mse") else kind(*kind.example)


def together(cases: Sequence[Any]) -> list[Any]:
    """Cases by op, dtype and layout, those of all operands in one: an item of pytest takes longer than such a case."""
    found: dict[str, list[Any]] = {}
    for case in cases:
        name = f"{case.op.name}-{str(case.dtype).removeprefix('torch.')}-{case.layout.name}"
        found.setdefault(name, []).append(case)
    return [pytest.param(several, id=name) for name, several in found.items()]


@contextmanager
def failing(case: Any) -> Iterator[None]:
    """An assertion inside names the case."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case.id}: {error}") from error


def square(*axes: Sequence[Any], mark: Any = pytest.mark.matrix) -> list[Any]:
    """The product, marked but for a Latin square, which `make test` runs: a case for each choice of all axes but the last."""
    places = itertools.product(*(range(len(axis)) for axis in axes))
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, place)),
            marks=() if sum(place) % len(axes[-1]) == 0 else mark,
        )
        for place in places
    ]


def spread(cases: Sequence[Any], keep: int = 2, of: int = 5) -> list[Any]:
    """Cases of a product, of which `make test` runs `keep` of each `of` in a row, `make matrix` the others.

    No factor of these products has five values, so that those kept have each value of each factor.
    """
    return [pytest.param(case, marks=() if i % of < keep else pytest.mark.matrix) for i, case in enumerate(cases)]
