"""The shape of the code: no circle of imports, few floors, short walks from a call to its kernel."""

from __future__ import annotations

import pytest

from benchmarks import shape


def test_imports_have_no_circle_and_few_floors() -> None:
    assert max(shape.floors(shape.imports()).values()) <= 10


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match=r"circle of imports among \['a', 'b'\]"):
        shape.floors({"a": {"b"}, "b": {"a", "c"}, "c": set()})


@pytest.mark.parametrize(
    ("name", "files", "changes"),
    [("hardshrink, forward", 7, 9), ("threshold_bce_with_logits_loss, forward and backward", 8, 14)],
)
def test_walks_are_short(name: str, files: int, changes: int) -> None:
    _, seen, changed = shape.walks()[name]
    assert seen <= files
    assert changed <= changes
