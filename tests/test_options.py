"""The tests of tests/kernels/test_options.py on the eager backend, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch

import triton_thresh as tt

from .kernels.test_options import *  # noqa: F403 - the tests are run here too
from .losses import NAMED
from .on_eager import device, on_the_eager_backend  # noqa: F401 - fixtures
from .rows import OPS

X, Y = torch.randn(4), torch.ones(4)


def test_what_is_refused() -> None:
    for error, words, options in (
        (TypeError, "mask has dtype torch.float32, expected torch.bool", {"mask": X}),
        (ValueError, "mask has shape", {"mask": torch.ones(3, dtype=torch.bool)}),
        (ValueError, "divisor goes with reduction 'mean'", {"divisor": 2.0, "reduction": "sum"}),
        (ValueError, "divisor must be a finite number above 0", {"divisor": 0.0}),
        (ValueError, "divisor requires grad", {"divisor": torch.tensor(2.0, requires_grad=True)}),
        (ValueError, "divisor has shape", {"divisor": torch.ones(4)}),
        (ValueError, "label_smoothing must be 0 to 1", {"label_smoothing": 1.5}),
        (ValueError, "label_smoothing goes with labels", {"label_smoothing": 0.1, "base": "mse"}),
        (TypeError, "ignore_index must be a number", {"ignore_index": "1"}),
    ):
        with pytest.raises(error, match=words):
            tt.threshold_loss(X, Y, **options)


@pytest.mark.parametrize("op", NAMED)
def test_a_named_loss_takes_every_option(op: str) -> None:
    call, row = getattr(tt, op), OPS[op].row
    base, rule = row.base(*row.base.example), row.rule(*row.rule.example)
    names = inspect.signature(call).parameters
    settings = {name: value for name, value in {**vars(base), **vars(rule)}.items() if name in names}
    x, y, weight = torch.tensor([0.1, 0.4, 0.6, 0.8]), torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, 3.0, 2.0, 1.0])
    options = [
        {"weight": weight},
        {"mask": torch.tensor([True, False, True, True])},
        {"ignore_index": 0},
        {"divisor": 3.0},
        {"reduction": "none"},
    ]
    options += [] if base.kind == "values" else [{"label_smoothing": 0.25}]
    plain = call(x, y, **settings, reduction="mean")
    for option in options:
        given = {"reduction": "mean"} | option
        found, expected = call(x, y, **settings, **given), tt.threshold_loss(x, y, rule, base=base, **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not torch.equal(found, plain), option
    if rule.least_positive(base) is not None:
        _, stats = call(x, y, **settings, return_stats=True)
        assert stats == tt.threshold_loss(x, y, rule, base=base, return_stats=True)[1]


@pytest.mark.slow
def test_options_on_the_backend_of_inductor() -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(300, generator=made)
    y = torch.where(torch.rand(300, generator=made) > 0.8, -100, torch.arange(300) % 2)
    mask = torch.rand(300, generator=made) > 0.2
    found = []
    for backend in ("eager", "inductor"):
        leaf = torch.where(mask, x, torch.nan).requires_grad_()
        with tt.use_backend(backend):
            given = {"mask": mask, "ignore_index": -100, "label_smoothing": 0.1, "return_stats": True}
            loss, stats = tt.threshold_loss(leaf, y, tt.ByOutcome(), base=tt.Focal(), **given)
        found.append((loss, *torch.autograd.grad(loss, leaf), *stats))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_options_compiled() -> None:
    x, y, mask = torch.randn(64), torch.arange(64) % 2, torch.arange(64) % 3 > 0

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, stats = tt.threshold_loss(
            x, y, tt.ByRank(0.5), base=tt.Focal(), mask=mask, ignore_index=5, label_smoothing=0.1, return_stats=True
        )
        return loss, stats.valid

    torch.compiler.reset()
    for ours, theirs in zip(torch.compile(step, fullgraph=True)(x), step(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_module_takes_its_options_and_moves_its_tensors() -> None:
    rule = tt.ByOutcome(torch.tensor([0.5, 0.25, 0.5, 0.75]), false_negative=3.0)
    module = tt.nn.ThresholdLoss(rule, tt.Focal(), ignore_index=0, return_stats=True)
    mask = torch.tensor([True, False, True, True])
    loss, stats = module(X, Y, mask=mask, divisor=2.0)
    expected = tt.threshold_loss(X, Y, rule, base=tt.Focal(), mask=mask, divisor=2.0, ignore_index=0)
    assert loss == expected
    assert stats.valid == 3
    assert set(module.state_dict()) == {"rule_threshold"}
    assert module.to("meta").rule_threshold.is_meta
