"""Thresholds from the data, by torch's own ops: values against torch, numpy, skimage and SAELens' rule; modules and compilers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_thresh as tt
from triton_thresh.functional import batch_topk, otsu_threshold, quantile_threshold, topk_threshold
from triton_thresh.nn import BatchTopK
from triton_thresh.thresholds import kth_largest

from .conftest import INTERPRETED
from .selection import DTYPES, FLOATS, batch_topk_of, nth, numbers, otsu_of, same

pytestmark = pytest.mark.skipif(INTERPRETED, reason="tests/kernels/test_select.py is what the interpreter runs")

SIZES = (1, 2, 511, 2000)  # both of torch's algorithms, and one element


# ------------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(dtype: torch.dtype, n: int) -> None:
    for x, k in itertools.product(numbers(dtype, n), nth(n)):
        same(topk_threshold(x, k), torch.topk(x, k).values[-1])
        same(topk_threshold(x.view(1, -1), k, -1), torch.topk(x.view(1, -1), k).values[..., -1:])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantile(dtype: torch.dtype, n: int) -> None:
    for x, q in itertools.product(numbers(dtype, n), (0.0, 1.0, 0.5, 0.3, 1 / n)):
        wide = x.double().numpy() if dtype != torch.int64 else x.numpy()
        expected = torch.tensor(np.quantile(wide, q, method="inverted_cdf")).to(dtype)
        same(quantile_threshold(x, q), expected)
        same(quantile_threshold(torch.stack([x, x.flip(0)]), q, -1), expected.expand(2, 1))


@given(st.integers(1, 400), st.floats(0, 1), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_ranks_are_rounded_once_in_float64(n: int, share: float, random: Any) -> None:
    x = torch.tensor(random.sample(range(10 * n), n), dtype=torch.float64)
    assert quantile_threshold(x, share).item() == np.quantile(x.numpy(), share, method="inverted_cdf")
    if share > 0:
        assert topk_threshold(x, fraction=share).item() == -np.quantile(-x.numpy(), share, method="inverted_cdf")


def test_a_share_that_float32_would_round() -> None:
    """0.1 * 30 is 3 in float64; three tenths of ten are 3.0000000000000004 as 0.1 + 0.2."""
    x = torch.arange(30)
    assert topk_threshold(x, fraction=0.1) == 27
    assert topk_threshold(x[:10], fraction=0.1 + 0.2) == 6
    assert quantile_threshold(x[:10], 0.1 + 0.2) == 3


def test_one_nan_makes_a_quantile_nan_in_its_row_alone() -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [3.0, 1.0, 2.0]])
    same(quantile_threshold(x, 0.5, -1), torch.tensor([[torch.nan], [2.0]]))
    assert quantile_threshold(x, 0).isnan()


@pytest.mark.parametrize("dim", [None, -1])
def test_shapes_and_strides(dim: int | None) -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    for view in (x, x.transpose(0, 2), x[:, ::2], x.flip(-1), x[0, 0, 0], x[..., :1], x[:1, :1].expand(3, 5, 4)):
        expected = view.contiguous()
        if dim is None:
            same(topk_threshold(view, 1), expected.max())
        else:
            same(topk_threshold(view, 1, dim), expected.amax(-1, keepdim=bool(expected.dim())))
    assert topk_threshold(x[:0], 2, -1).shape == (0, 3, 1)


def test_results_do_not_require_grad() -> None:
    x = torch.randn(10, requires_grad=True)
    for result in (
        topk_threshold(x, 2),
        quantile_threshold(x, 0.5),
        otsu_threshold(x),
        kth_largest(x, torch.tensor(3)),
    ):
        assert not result.requires_grad
    for function in (lambda x: topk_threshold(x, 2), otsu_threshold):
        value, tangent = torch.func.jvp(function, (x.detach(),), (torch.ones(10),))
        assert tangent == 0
        same(value, function(x.detach()))


def test_rank_on_the_device() -> None:
    x = torch.tensor([3.0, torch.nan, 1.0, 2.0])
    for k, expected in [(1, torch.nan), (2, 3.0), (4, 1.0), (9, 1.0), (0, torch.nan), (-1, torch.nan)]:
        same(kth_largest(x, torch.tensor(k)), torch.tensor(expected))
        same(torch.func.vmap(kth_largest)(x[None], torch.tensor([k])), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: topk_threshold(x), ValueError, "exactly one of k and fraction, got neither"),
        (lambda x: topk_threshold(x, 1, fraction=0.5), ValueError, "got k=1 and fraction=0.5"),
        (lambda x: topk_threshold(x, 0), ValueError, "k must be 1 to 6, the number of elements, got 0"),
        (lambda x: topk_threshold(x, 4, -1), ValueError, "k must be 1 to 3, the number of elements of a row, got 4"),
        (lambda x: topk_threshold(x, 2.5), TypeError, "k must be an int, got float 2.5; a share goes as fraction="),
        (lambda x: topk_threshold(x, fraction=0), ValueError, "fraction must be above 0 and at most 1, got 0"),
        (lambda x: topk_threshold(x, fraction=1.5), ValueError, "fraction must be above 0 and at most 1, got 1.5"),
        (lambda x: topk_threshold(x, fraction="1"), TypeError, "fraction must be a number, got str"),
        (lambda x: topk_threshold(x, 1, 0), ValueError, "dim must be None or -1, got 0"),
        (lambda x: topk_threshold(x[:0], 1), ValueError, r"shape \(0, 3\), expected at least one element"),
        (lambda x: topk_threshold(x[:, :0], 1, -1), ValueError, "expected at least one element"),
        (lambda x: topk_threshold(x > 0, 1), TypeError, "dtype torch.bool, expected one of float16"),
        (lambda x: topk_threshold([1.0], 1), TypeError, "input must be a tensor, got list"),
        (lambda x: quantile_threshold(x, 1.1), ValueError, "q must be 0 to 1, got 1.1"),
        (lambda x: quantile_threshold(x, math.nan), ValueError, "q must be 0 to 1, got nan"),
        (lambda x: quantile_threshold(x, None), TypeError, "q must be a number, got NoneType"),
        (lambda x: otsu_threshold(x, 1), ValueError, "bins must be 2 or more, got 1"),
        (lambda x: otsu_threshold(x, 2.0), TypeError, "bins must be an int, got float 2.0"),
        (lambda x: otsu_threshold(x.int()), TypeError, "dtype torch.int32, expected one of float16"),
        (lambda x: otsu_threshold(x[:0]), ValueError, "input is empty"),
        (lambda x: batch_topk(x, -1), ValueError, "batch_topk: k must be 0 or more, got -1"),
        (lambda x: batch_topk(x, math.nan), ValueError, "k must be 0 or more, got nan"),
        (lambda x: batch_topk(x.int(), 1), TypeError, "dtype torch.int32"),
        (lambda x: BatchTopK(-1), ValueError, "BatchTopK: k must be 0 or more"),
        (lambda x: BatchTopK(1, 1.5), ValueError, "momentum must be 0 to 1, got 1.5"),
        (lambda x: BatchTopK(1)(x.int()), TypeError, "BatchTopK: input has dtype torch.int32"),
        (lambda x: BatchTopK(1).eval()(x.int()), TypeError, "BatchTopK: input has dtype torch.int32"),
    ],
)
def test_errors(call: Callable[[Tensor], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------------------------------ Otsu


def image(name: str) -> npt.NDArray[np.uint8]:
    """One of scikit-image's where that is installed, else bright discs over a slope, with noise."""
    try:
        from skimage import data
    except ImportError:
        generator = np.random.default_rng(len(name))
        y, x = np.mgrid[:96, :128]
        discs = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2) < 11**2
        seen = 60 + 0.3 * x + 90 * discs + generator.normal(0, 14, x.shape)
        return np.clip(seen, 0, 255).astype(np.uint8)
    return getattr(data, name)()[::4, ::4].copy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["camera", "coins"])
def test_otsu_of_an_image(name: str) -> None:
    seen = image(name)
    for dtype in (np.uint8, np.int16):
        own = seen.astype(dtype) * (1 if dtype == np.uint8 else 100)
        assert otsu_threshold(torch.from_numpy(own)).item() == otsu_of(own)
    for dtype, bins in itertools.product((np.float32, np.float64), (256, 2, 100, 2000)):
        own = seen.astype(dtype) / 255
        found, width = otsu_threshold(torch.from_numpy(own), bins), (own.max() - own.min()) / bins
        assert found.dtype == torch.from_numpy(own).dtype
        assert abs(found.item() - otsu_of(own, bins)) <= 1.001 * width


def test_the_oracle_is_skimages() -> None:
    filters = pytest.importorskip("skimage.filters")
    seen = image("coins")
    assert otsu_of(seen) == filters.threshold_otsu(seen)
    for bins in (2, 100, 256):
        assert otsu_of(seen / 255, bins) == filters.threshold_otsu(seen / 255, bins)


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_otsu_of_integers(values: list[int], signed: bool) -> None:
    own = np.array(values, np.int8) if signed else np.array(values).astype(np.uint8)
    assert otsu_threshold(torch.from_numpy(own)).item() == otsu_of(own)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 1.6e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_otsu_of_any_range(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float64:
        scale = scale**8 if scale != 1e-44 else 1e-322
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(-(2**20), 2**20, (500,), generator=generator).double()
    x = (units / 2**20 * scale).to(dtype)
    width = x.double().max() / 256 - x.double().min() / 256
    exact = x.double() / x.abs().max().double()  # the same picture, from -1 to 1
    expected = otsu_of(exact.numpy()) * x.abs().max().double()
    assert abs(otsu_threshold(x).double() - expected) <= 2 * width + torch.finfo(dtype).smallest_normal * 2**-20


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_otsu_of_special_floats(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        assert otsu_threshold(torch.tensor([1.0, 2.0, value], dtype=dtype)).isnan()
    for value in (3.0, 0.1, -0.0, torch.finfo(dtype).max):
        same(otsu_threshold(torch.full((5,), value, dtype=dtype)), torch.tensor(value, dtype=dtype))
    parted = torch.tensor([0.0, 1, 1, 100, 101], dtype=dtype)
    assert 0.9 < otsu_threshold(parted) < 100
    assert otsu_threshold(torch.tensor([7, 7], dtype=torch.uint8)) == 7


# ------------------------------------------------------------------------------------------------------------- BatchTopK


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [0, 0.1, 1, 2.5, 3, 7, 100, math.inf])
def test_batch_topk(k: float, dtype: torch.dtype) -> None:
    for x in numbers(dtype, 84):
        x = x.view(4, 3, 7).clone().requires_grad_()
        y = batch_topk(x, k)
        same(y.detach(), batch_topk_of(x.detach(), k))
        (dx,) = torch.autograd.grad(y, x, torch.full_like(x, 3))
        same(dx, torch.where(y.detach() != 0, 3, 0).to(dtype))


def test_batch_topk_shapes() -> None:
    same(batch_topk(torch.tensor(2.0), 1), torch.tensor(2.0))
    same(batch_topk(torch.tensor(2.0), 0.5), torch.tensor(0.0))
    assert batch_topk(torch.zeros(3, 0), 1).shape == (3, 0)
    assert batch_topk(torch.zeros(0, 3), 1).shape == (0, 3)
    x = torch.randn(6, 5).t()
    assert batch_topk(x, 2).stride() == x.stride()


def saelens(batches: list[Tensor], k: float, rate: float) -> tuple[list[Tensor], Tensor]:
    """BatchTopK of sae_lens 6.54.12: relu, the int(k * rows) largest; its threshold in float64, moved by the smallest kept."""
    threshold, outputs = torch.zeros((), dtype=torch.float64), []
    for x in batches:
        values, places = x.relu().flatten().topk(int(k * x.shape[:-1].numel()))
        outputs.append(torch.zeros(x.numel(), dtype=x.dtype).scatter(0, places, values).view(x.shape))
        if (values > 0).any():
            threshold = (1 - rate) * threshold + rate * values[values > 0].min().double()
    return outputs, threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [3, 2.6, 30])
def test_module_tracks_what_saelens_tracks(k: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 32, dtype=dtype) * scale for scale in torch.linspace(1, 3, 50)]
    batches[10] = -batches[10].abs()  # nothing to keep
    outputs, threshold = saelens(batches, k, 0.01)
    module = BatchTopK(k)
    for x, expected in zip(batches, outputs, strict=True):
        same(module(x), expected)
    same(module.topk_threshold, threshold)
    x = batches[0]
    same(module.eval()(x), torch.where(x > threshold, x, 0))
    same(module.topk_threshold, threshold)
    restored = BatchTopK(k)
    checkpoint = {"W_enc": torch.zeros(3), "topk_threshold": threshold}
    restored.load_state_dict(checkpoint, strict=False)
    same(restored.topk_threshold, threshold)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_evaluation_compares_without_rounding(dtype: torch.dtype) -> None:
    """Beside thresholds that float32 cannot hold, on either side of the number that is nearest."""
    module = BatchTopK(1).eval()
    for threshold in (1 / 3, 2 / 3, 1.0, 1.0 + 2**-40, 1.0 - 2**-40, 0.0, 1e-60, math.inf):
        module.topk_threshold.fill_(threshold)
        near = torch.tensor(threshold).to(dtype)
        up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)
        x = torch.stack(
            [near, torch.nextafter(near, up), torch.nextafter(near, down), torch.tensor(math.nan, dtype=dtype)]
        )
        expected = torch.where(x.double() > torch.tensor(threshold, dtype=torch.float64), x, 0)
        same(module(x), expected)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.activation = nn.Linear(3, 4), BatchTopK(2, momentum=1.0)


def test_buffer_stays_float64() -> None:
    model = Nested()
    x = torch.rand(5, 4, dtype=torch.float64).bfloat16() + 0.01
    for cast in (model.bfloat16(), model.half(), model.float(), model.to(torch.float16), copy.deepcopy(model)):
        assert cast.encoder.weight.dtype != torch.float64
        cast.activation(x)
        assert cast.activation.topk_threshold.dtype == torch.float64
    assert model.activation.topk_threshold == x.flatten().topk(10).values[-1]
    for assign in (False, True):
        saved = {name: value.half() for name, value in model.state_dict().items()}
        model.load_state_dict(saved, assign=assign)
        assert model.activation.topk_threshold.dtype == torch.float64
        assert saved["activation.topk_threshold"].dtype == torch.float16
    with torch.device("meta"):
        empty = Nested()
    assert empty.half().activation.topk_threshold.dtype == torch.float64
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    same(empty.activation.topk_threshold, model.activation.topk_threshold)


def test_module_under_16_bits_and_settings() -> None:
    module = BatchTopK(2.5, momentum=0.25)
    assert repr(module) == "BatchTopK(k=2.5, momentum=0.25)"
    module(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float16).expand(2, 3))
    same(module.topk_threshold, torch.tensor(0.25, dtype=torch.float64))
    x = torch.tensor([0.2, 0.25, 0.3], dtype=torch.bfloat16)
    same(module.eval()(x), torch.tensor([0, 0, 0.3], dtype=torch.bfloat16))
    still = BatchTopK(1, momentum=0)
    still(torch.ones(3))
    assert still.topk_threshold == 0


# ------------------------------------------------------------------------------------------------- features that fired


@pytest.mark.parametrize("shape", [(7,), (30, 16), (3, 2, 5), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fired(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    for threshold in (0.1, torch.randn(shape[-1]), torch.randn(shape[-1], requires_grad=True)):
        y, l0, fired = tt.jumprelu_l0(x, threshold, 0.5, return_fired=True)
        above = x.detach().double() > torch.as_tensor(threshold).detach()
        same(fired, above.sum([*range(len(shape) - 1)], dtype=torch.int64) if len(shape) > 1 else above.long())
        assert not fired.requires_grad
        for found, expected in zip((y, l0), tt.jumprelu_l0(x, threshold, 0.5), strict=True):
            same(found, expected)
    assert fired.sum() == l0.sum()


def test_fired_by_other_ways() -> None:
    x = torch.randn(3, 4, 12)

    def fired(x: Tensor) -> Tensor:
        return tt.jumprelu_l0(x, 0.2, return_fired=True)[-1]

    same(torch.func.vmap(fired)(x), torch.stack([fired(each) for each in x]))
    same(torch.jit.trace(fired, (x,))(-x), fired(-x))
    ragged = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.tensor([0, 5, 12]))
    same(fired(ragged), fired(x))

    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fired(x)

    same(torch.export.export(Program(), (x,)).module()(x), fired(x))


# ------------------------------------------------------------------------------------------------ compilers, transforms

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda x: topk_threshold(x, 3),
    "topk of rows": lambda x: topk_threshold(x, 3, -1),
    "fraction": lambda x: topk_threshold(x, fraction=0.1),
    "fraction of rows": lambda x: topk_threshold(x, dim=-1, fraction=0.3),
    "quantile": lambda x: quantile_threshold(x, 0.7),
    "quantile of rows": lambda x: quantile_threshold(x, 0.7, -1),
    "otsu": otsu_threshold,
    "rank on the device": lambda x: kth_largest(x, (x > 0).sum() // 2),
    "batch_topk": lambda x: batch_topk(x, 2.5),
    "batch_topk of few": lambda x: batch_topk(x, 0.2),
}


def every(x: Tensor) -> list[Tensor]:
    return [call(x) for call in CALLS.values()]


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 12, generator=generator).to(dtype) for rows in (16, 24, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_compiled(first: int) -> None:
    """Every second call in one program."""
    calls = [*CALLS.values()][first::2]

    def program(x: Tensor) -> list[Tensor]:
        return [call(x) for call in calls]

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for x in batches():
        for actual, expected in zip(compiled(x), program(x), strict=True):
            same(actual, expected)


@pytest.mark.slow
def test_inductor_trains_the_module() -> None:
    """In a 16-bit type, which Inductor keeps in float32 unless it is told to round."""
    torch._dynamo.reset()
    plain, module = BatchTopK(2.5, momentum=0.5), BatchTopK(2.5, momentum=0.5)
    compiled = torch.compile(module, fullgraph=True)
    for x in batches(torch.bfloat16)[:1]:
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaf).square().sum().backward()
        plain(other).square().sum().backward()
        same(leaf.grad, other.grad)
        same(module.topk_threshold, plain.topk_threshold)


@pytest.mark.parametrize("name", CALLS)
def test_export_with_every_dimension_dynamic(name: str) -> None:
    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CALLS[name](x)

    auto = torch.export.Dim.AUTO
    program = torch.export.export(Program(), (batches()[0],), dynamic_shapes={"x": {0: auto, 1: auto}})
    assert not any("triton_thresh" in str(node.target) for node in program.graph.nodes)
    for x in [*batches(), torch.randn(5, 9)]:
        same(program.module()(x), CALLS[name](x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_trace_vmap_and_derivatives(name: str) -> None:
    call, x = CALLS[name], batches()[0]
    same(torch.jit.trace(call, (x,))(-x), call(-x))
    stacked = torch.stack([x, 2 * x, -x])
    same(torch.func.vmap(call)(stacked), torch.stack([call(each) for each in stacked]))
    value, tangent = torch.func.jvp(call, (x,), (torch.full_like(x, 2),))
    same(value, call(x))
    same(tangent, torch.where(value != 0, 2.0, 0.0) if "batch" in name else torch.zeros_like(value))
    if "batch" in name:
        same(torch.func.grad(lambda x: call(x).square().sum())(x), 2 * call(x))
        assert torch.autograd.gradgradcheck(call, x.double().requires_grad_())


def test_nothing_is_read_by_the_host() -> None:
    """A fake tensor has no value to read."""
    with FakeTensorMode():
        for result in every(torch.empty(16, 12)):
            assert isinstance(result, Tensor)
        module = BatchTopK(2)
        module(torch.empty(16, 12))
        module.eval()(torch.empty(16, 12))
