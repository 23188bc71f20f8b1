"""Launches past Triton's binder are those that the binder would have made: the stub driver records both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="launches need Triton")

import torch
import triton
from torch import Tensor

from benchmarks.stub_driver import SM_90, StubDriver
from triton_thresh import launch
from triton_thresh.kernels import gate, pointwise
from triton_thresh.launch import NUMBER, SCALAR, Kernel, triton_dtype

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter binds nothing")


def kernel(kinds: tuple[int, ...] = (NUMBER,)) -> Kernel:
    constants = dict(
        KINDS=kinds,
        FUNCTION=pointwise.hardshrink,
        COMPUTE=triton_dtype(torch.float32),
        PROMOTED=None,
        BITS=0,
        BY_COLUMN=False,
        COLS=512,
    )
    return Kernel(gate.forward, num_warps=4, **constants)


@pytest.fixture
def stub() -> Iterator[StubDriver]:
    with StubDriver() as driver:
        yield driver


def aligned(dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    made = torch.zeros(272, dtype=dtype)
    assert made.data_ptr() % 16 == 0
    return made[offset : offset + 256]


CALLS = {
    "as before": (aligned(), aligned(), None, 256, 1, None, ((0.5,),)),
    "other numbers": (aligned(), aligned(), None, 255, 1, None, ((-0.0,),)),
    "bits": (aligned(), aligned(), aligned(torch.uint8), 256, 1, None, ((0.5,),)),
    "input off by 4 bytes": (aligned(offset=1), aligned(), None, 256, 1, None, ((0.5,),)),
    "output off by 4 bytes": (aligned(), aligned(offset=1), None, 256, 1, None, ((0.5,),)),
    "bfloat16": (aligned(torch.bfloat16), aligned(torch.bfloat16), None, 256, 1, None, ((0.5,),)),
    "one element": (aligned(), aligned(), None, 1, 1, None, ((0.5,),)),
    "2**31 elements": (aligned(), aligned(), None, 1 << 31, 1, None, ((0.5,),)),
}


def test_each_signature_is_compiled_for_and_met_again(stub: StubDriver) -> None:
    """Twice in turn: the second time nothing is bound, and everything recorded is as the first time."""
    own = kernel()
    for arguments in CALLS.values():
        own(3, *arguments)
    first = stub.launches
    stub.clear()
    for arguments in reversed(CALLS.values()):
        own(3, *arguments)
    assert stub.launches == first[::-1]
    assert len(first) == len(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_launched_is_what_the_binder_launches(name: str, stub: StubDriver) -> None:
    """Whatever was launched before."""
    own = kernel()
    for arguments in CALLS.values():
        own(3, *arguments)
    stub.clear()
    own(3, *CALLS[name])
    (launched,) = stub.launches
    stub.clear()
    own._launch(3, CALLS[name])
    assert stub.launches == [launched]


def test_a_tensor_among_the_operands(stub: StubDriver) -> None:
    own = kernel((SCALAR,))
    x = aligned()
    for t in (torch.zeros(()), torch.zeros((), dtype=torch.float64), aligned(offset=1)[0]):
        own(1, x, x, None, 256, 1, None, ((t,),))
        found = stub.launches
        stub.clear()
        own._launch(1, (x, x, None, 256, 1, None, ((t,),)))
        assert stub.launches == found
        stub.clear()


def test_integers_by_what_is_compiled_for() -> None:
    ordinary = launch._facts((17,))
    assert launch._facts((33,)) == ordinary
    assert len({launch._facts((value,)) for value in (17, 1, 16, 1 << 31, (1 << 31) + 1)}) == 5


def test_another_device_is_another_kernel() -> None:
    own, arguments = kernel(), CALLS["as before"]
    for _ in range(2):
        with StubDriver() as driver:
            own(1, *arguments)
            own(1, *arguments)
            assert len(driver.launches) == 2


def test_amds_binder_is_always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the size of storages too."""
    monkeypatch.setattr(launch, "_is_nvidia", lambda device: False)
    own = kernel()
    with StubDriver(SM_90) as driver:
        own(1, *CALLS["as before"])
        own(1, *CALLS["as before"])
        assert len(driver.launches) == 2
    assert not own._compiled


class Recorder:
    """In a compiled kernel's place."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(("run", arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("[]", arguments))


@pytest.mark.parametrize("kind", ["enter", "exit"])
def test_a_profilers_hooks_see_launches(kind: str, stub: StubDriver) -> None:
    own, arguments, recorder = kernel(), CALLS["as before"], Recorder()
    own(3, *arguments)
    (key,) = own._compiled
    nothing = (None,) * 5  # function, metadata, and no hooks
    own._compiled[key] = recorder, recorder.run, nothing
    chain, hook = getattr(triton.knobs.runtime, f"launch_{kind}_hook"), lambda metadata: None
    own(3, *arguments)
    chain.add(hook)
    try:
        own(3, *arguments)
    finally:
        chain.remove(hook)
    own(3, *arguments)
    assert [name for name, _ in recorder.calls] == ["run", "[]", "run"]
    assert recorder.calls[0][1] == (3, 1, 1, 0, *nothing, *arguments, *own._constants)
    assert recorder.calls[1][1] == (*arguments, *own._constants)


def test_constants_stand_in_order() -> None:
    with pytest.raises(AssertionError):
        Kernel(gate.backward_bit, num_warps=1, n=5)
