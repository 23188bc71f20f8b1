"""The crossovers of "auto": where they come from, what they decide, how they are measured. No kernel runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_thresh as tt
from triton_thresh import backend, crossing, dispatch, measured, tuning
from triton_thresh.backend import has_triton
from triton_thresh.families import gate
from triton_thresh.measured import Config, Table
from triton_thresh.registry import OPS

pytestmark = pytest.mark.skipif(not has_triton(), reason="without Triton every call is eager")

GPU = "Some GPU"
CPU = torch.device("cpu")
SHIPPED = {"hardshrink/float32": 1000, "hardshrink/float32/grad": 500, "mse.ByPrediction/float32/grad": 64}


@pytest.fixture(autouse=True)
def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """CPU tensors count as a GPU's, with crossovers shipped for it and an empty cache on disk."""
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path))
    for module in (dispatch, tuning):
        monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(backend, "is_driven", lambda device: True)
    monkeypatch.setattr(tuning, "device_name", lambda device: GPU)
    monkeypatch.setattr(measured, "shipped", lambda name: Table({}, SHIPPED))
    for cache in (measured.cached, dispatch._looked_up):
        cache.cache_clear()
    with tt.use_backend("auto"):
        yield
    for cache in (measured.cached, dispatch._looked_up):
        cache.cache_clear()


def test_below_the_crossover_auto_is_eager() -> None:
    for numel, records, expected in (
        (999, False, "eager"),
        (1000, False, "triton"),
        (999, True, "triton"),
        (499, True, "eager"),
    ):
        assert dispatch.chosen("hardshrink", torch.empty(numel), records)[0] == expected
    assert dispatch.chosen("hardshrink", torch.empty(1, dtype=torch.float64), False)[0] == "triton", "not measured"
    x = torch.randn(300)
    assert torch.equal(tt.hardshrink(x), torch.nn.functional.hardshrink(x)), "no kernel could have run"


def test_the_loss_too() -> None:
    x = torch.rand(63, requires_grad=True)
    tt.threshold_mse_loss(x, torch.rand(63), 0.5).backward()
    assert x.grad is not None


def test_what_was_asked_for_is_done_at_every_size() -> None:
    for asked in ("triton", "eager"):
        with tt.use_backend(asked):
            assert dispatch.chosen("hardshrink", torch.empty(1), False) == (asked, "asked for")


def test_explain_says_so() -> None:
    told = tt.explain("hardshrink", torch.empty(10), 0.5)
    assert (told.backend, told.reason) == ("eager", "auto: eager torch was measured to be faster below 1,000 elements")
    told = tt.explain("threshold_mse_loss", torch.rand(63, requires_grad=True), torch.rand(63), 0.5)
    assert told.reason == "auto: eager torch was measured to be faster below 64 elements"


def test_explain_looks_up_what_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def crossover(op: str, dtype: torch.dtype, device: torch.device, records: bool) -> int:
        asked.append((op, dtype, records))
        return 1000  # all calls are eager

    monkeypatch.setattr(dispatch, "crossover", crossover)
    monkeypatch.setattr(gate, "runs_eagerly", lambda x: False)
    measured = {key for op in OPS.values() for key in _keys(op)}
    learning = torch.tensor(0.5, requires_grad=True)
    for grad in (False, True):
        x = torch.rand(60, requires_grad=grad)
        for name, *arguments in (
            ("hardshrink", x, 0.5),
            ("softshrink", x, 0.5),
            ("softshrink", x, learning),
            ("softshrink", x, learning.detach()),
            ("binary_threshold", x, 0.5),
            ("jumprelu", x, learning),
            ("threshold_grad", x, 0.5),
            ("threshold_mse_loss", x, torch.rand(60), 0.5),
        ):
            asked.clear()
            getattr(tt, name)(*arguments)
            (key,) = asked
            asked.clear()
            tt.explain(name, *arguments)
            assert asked == [key], name
            assert key[::2] in measured or key[0] == "softshrink_learned"


def _keys(op: Any) -> Iterator[tuple[str, bool]]:
    if op.family in crossing.CROSSINGS:
        for name, differs, _ in crossing.CROSSINGS[op.family](op):
            yield from ((name, records) for records in {False, differs})


def test_many_tensors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "shipped", lambda name: Table({}, {"threshold_gradients_/float32": 3}))
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.tensor([0.1, 1.0, -2.0, 0.0, 5.0])
    told = tt.explain("threshold_gradients_", parameters, 0.5)
    assert told.reason == "auto: eager torch was measured to be faster below 3 tensors"
    tt.threshold_gradients_(parameters, 0.5)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [0.0, 1.0, -2.0, 0.0, 5.0]


def test_the_users_own_give_way_to_the_shipped_and_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.crossover("threshold", torch.float32, CPU, False) == 0
    dispatch.remember_crossovers(GPU, {"hardshrink/float32": 7, "threshold/float32": 8})
    assert dispatch.crossover("hardshrink", torch.float32, CPU, False) == 1000
    assert dispatch.crossover("threshold", torch.float32, CPU, False) == 8
    monkeypatch.setattr(tuning, "among_others", lambda: True)
    assert dispatch.crossover("hardshrink", torch.float32, CPU, False) == 1000
    assert dispatch.crossover("threshold", torch.float32, CPU, False) == 0


def test_block_sizes_and_crossovers_share_a_file() -> None:
    measured.remember(GPU, {"hardshrink/float32/10": Config(256, 2)})
    measured.remember(GPU, crossovers={"threshold/float32": 8})
    written = json.loads(measured.cache_path(GPU).read_text())
    assert written == {
        "device": GPU,
        "entries": {"hardshrink/float32/10": [256, 2]},
        "crossovers": {"threshold/float32": 8},
    }
    measured.cached.cache_clear()
    assert measured.cached(GPU).entries == {"hardshrink/float32/10": Config(256, 2)}
    assert measured.cached(GPU).crossovers == {"threshold/float32": 8}


@pytest.mark.parametrize(
    "crossovers", [{"a/float32": -1}, {"a/float32": "many"}, {"a/float32": True}, {"a/float32": 1.5}]
)
def test_malformed_crossovers_are_left_out_with_a_warning(crossovers: dict[str, Any]) -> None:
    text = json.dumps({"entries": {}, "crossovers": {**crossovers, "b/float32": 4}})
    with pytest.warns(UserWarning, match="1 malformed crossovers of a file"):
        assert measured.parse(text, "a file").crossovers == {"b/float32": 4}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": {}}', '{"crossovers": {}}'])
@pytest.mark.filterwarnings("ignore:triton_thresh. ignoring a file")
def test_a_table_without_crossovers(text: str) -> None:
    assert measured.parse(text, "a file").crossovers == {}


def test_crossovers_without_block_sizes() -> None:
    with pytest.warns(UserWarning, match="ignoring a file: not a table of block sizes"):
        assert measured.parse('{"crossovers": {"a/float32": 5}}', "a file") == Table({}, {"a/float32": 5})


@pytest.mark.parametrize("crossovers", [[1], None, "many"])
def test_crossovers_that_are_no_table(crossovers: object) -> None:
    text = json.dumps({"entries": {}, "crossovers": crossovers})
    with pytest.warns(UserWarning, match="the crossovers of a file: not a table"):
        assert measured.parse(text, "a file").crossovers == {}


def seconds(monkeypatch: pytest.MonkeyPatch, triton: Callable[[int], float]) -> None:
    """Eager torch takes 1 at every size; a step is its size."""
    monkeypatch.setattr(crossing, "_seconds", lambda step, device: 1.0 if tt.get_backend() == "eager" else triton(step))


@pytest.mark.parametrize(
    ("triton", "expected"),
    [
        (lambda size: 0.5, 0),
        (lambda size: 1.04, 0),
        (lambda size: 2.0 if size < 100 else 0.5, 256),
        (lambda size: 2.0 if size in (1, 64) else 0.5, 256),
        (lambda size: 2.0, 1024),
    ],
    ids=["always faster", "as fast", "slower below 100", "slower at two sizes", "never faster"],
)
def test_a_crossover_is_where_slowness_ends(
    triton: Callable[[int], float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(monkeypatch, triton)
    assert crossing.crossing([1, 4, 16, 64, 256, 1024], lambda size: size, CPU) == expected  # type: ignore[arg-type, return-value]


def test_every_op_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is looked up by the key under which it was measured."""
    asked: list[str] = []
    monkeypatch.setattr(crossing, "crossing", lambda sizes, step, device: 5)
    monkeypatch.setattr(gate, "runs_eagerly", lambda tensor: False)  # the way round all this for CPU tensors
    monkeypatch.setattr(dispatch, "crossover", lambda op, dtype, device, records: asked.append(op) or 1 << 40)
    measured = {key.split("/")[0] for op in OPS.values() for key, _ in crossing.crossovers(op, torch.float32, CPU)}
    for name, op in OPS.items():
        asked.clear()
        x = torch.rand(4, 4, requires_grad=True)
        if op.family == "foreach":
            x.grad = torch.rand(4, 4)
            op([x], 0.5)
        elif op.family == "loss":
            base = op.base if op.rule is not None else "mse"
            op(x, torch.rand(4, 4), (op.rule or tt.ByLoss)(0.5), base=base)
        else:
            op(x, 0.5)
        assert asked, name
        assert set(asked) <= measured, name
