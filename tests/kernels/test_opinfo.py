"""PyTorch's own operator database through the pack: its samples of every function that an op of the pack replaces.

A loss has settings for which its weight is 1 everywhere. Values, gradients and layouts as torch's own function gives them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("expecttest", reason="PyTorch's operator database needs expecttest")

import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh.checks import round_to

from ..conftest import FULL

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = FLOATS if FULL else (torch.bfloat16, torch.float32)

Loss = Callable[..., Tensor]


def _by_prediction(loss: Loss) -> list[Loss]:
    """Equal weights; every prediction above the threshold; none."""
    return [
        lambda x, y, **rest: loss(x, y, 0.5, 1.0, 1.0, **rest),
        lambda x, y, **rest: loss(x, y, -torch.inf, 1.0, 0.1, **rest),
        lambda x, y, **rest: loss(x, y, torch.inf, 0.1, 1.0, **rest),
    ]


PACK: dict[str, list[Callable[..., Tensor]]] = {
    "threshold": [tt.threshold],
    "hardshrink": [tt.hardshrink],
    "softshrink": [tt.softshrink],
    "mse_loss": [
        *_by_prediction(tt.threshold_mse_loss),
        lambda x, y, **rest: tt.proximity_mse_loss(x, y, 0.5, penalty_factor=0.0, **rest),
        lambda x, y, **rest: tt.exceedance_mse_loss(x, y, penalty_factor=1.0, **rest),
    ],
    "binary_cross_entropy": _by_prediction(tt.threshold_bce_loss),
    "binary_cross_entropy_with_logits": _by_prediction(tt.threshold_bce_with_logits_loss),
}
GATES = ("threshold", "hardshrink", "softshrink")
every_operator = pytest.mark.parametrize("name", PACK)


@functools.cache
def operators() -> dict[str, Any]:
    """The database's entries (it takes seconds to import)."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.")}


class Sample(NamedTuple):
    """An input, and torch's function and the pack's of it alone."""

    input: Tensor
    torch: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]
    rest: tuple[tuple[Any, ...], dict[str, Any]]

    def in_double(self, function: Loss) -> Callable[[Tensor], Tensor]:
        """A loss with every tensor beside its input in float64."""
        (y,), keywords = self.rest
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
        return lambda x: function(x, y.double(), **wide)


def samples(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """The database's samples, contiguous and not; thresholds are rounded to the dtype, as torch's CPU kernels do not."""
    function = getattr(torch.nn.functional, name)
    found = list(operators()[name].sample_inputs(device, dtype, requires_grad=False))
    for sample in found[:: 1 if FULL else max(1, len(found) // 3)]:
        for form in (sample, sample.noncontiguous()):
            args, keywords = form.args, form.kwargs
            if name in GATES and dtype.is_floating_point:
                args = tuple(round_to(v, dtype) for v in args)
                keywords = {k: round_to(v, dtype) for k, v in keywords.items()}
            for pack in PACK[name]:
                yield Sample(
                    form.input,
                    lambda x, args=args, keywords=keywords: function(x, *args, **keywords),
                    lambda x, pack=pack, args=args, keywords=keywords: pack(x, *args, **keywords),
                    (args, keywords),
                )


def close(name: str, actual: Any, expected: Any) -> None:
    """Gates bit for bit but for the sign of zero."""
    exact: dict[str, Any] = {"rtol": 0, "atol": 0} if name in GATES else {}
    torch.testing.assert_close(actual, expected, equal_nan=True, **exact)


def upstream(output: Tensor) -> Tensor:
    g = torch.arange(output.numel(), device=output.device) % 7 - 3
    return g.to(output.dtype).view(output.shape)


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = function(x)
    return [output.detach(), *torch.autograd.grad(output, x, upstream(output))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_operator
def test_values_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """In 16 bits a loss is held to torch's own in float64: torch's in 16 bits rounds between its steps."""
    for sample in samples(name, dtype, device):
        actual, expected = (value_and_gradient(f, sample.input) for f in (sample.pack, sample.torch))
        assert not sample.input.numel() or actual[0].stride() == expected[0].stride()
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        with torch.no_grad():
            close(name, sample.pack(sample.input), actual[0])
        if name in GATES or dtype.itemsize > 2:
            close(name, actual, expected)
        else:
            exact = value_and_gradient(sample.in_double(getattr(torch.nn.functional, name)), sample.input.double())
            rtol = torch.finfo(dtype).eps  # a gradient may be rounded twice, before and after it is scaled
            torch.testing.assert_close([t.double() for t in actual], exact, rtol=rtol, atol=1e-6)


@every_operator
def test_second_gradients(name: str, device: torch.device) -> None:
    """Of the gradient's sum of squares, to the input and to the upstream gradient."""
    for sample in samples(name, torch.float64, device):
        outcomes = []
        for function in (sample.pack, sample.torch):
            x = sample.input.detach().requires_grad_()
            output = function(x)
            g = upstream(output).requires_grad_()
            (dx,) = torch.autograd.grad(output, x, g, create_graph=True)
            outcomes.append(torch.autograd.grad((dx**2).sum(), (x, g), materialize_grads=True))
        close(name, *outcomes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(dtype: torch.dtype, device: torch.device) -> None:
    for sample in samples("threshold", dtype, device):
        try:
            expected = sample.torch(sample.input)
        except RuntimeError:
            with pytest.raises(RuntimeError, match=f"{dtype} cannot hold"):
                sample.pack(sample.input)
        else:
            close("threshold", sample.pack(sample.input), expected)


@every_operator
def test_errors(name: str, device: torch.device) -> None:
    """The database's wrong inputs raise as they do in torch; a target that torch would broadcast raises here."""
    operator = operators()[name]
    for wrong in operator.error_inputs(device) if operator.error_inputs_func else ():
        for pack in PACK[name]:
            with pytest.raises(wrong.error_type):
                pack(wrong.sample_input.input, *wrong.sample_input.args, **wrong.sample_input.kwargs)
    if name in GATES:
        return
    for sample in itertools.islice(samples(name, torch.float32, device), 0, None, 3):
        (y,), keywords = sample.rest
        if y.dim() and y.shape[0] > 1:
            for pack in PACK[name]:
                with pytest.raises(ValueError, match="no broadcasting"):
                    pack(sample.input, y[:1], **keywords)
