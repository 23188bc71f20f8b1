"""The choice of backend: settings, environment, and what happens without Triton or without a device for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import triton_thresh as tt
from triton_thresh import backend

from .conftest import INTERPRETED

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def setting_restored() -> Iterator[None]:
    before = backend._setting[0]
    yield
    backend._setting[0] = before


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, not Triton's."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_THRESH_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_set_and_get(name: str) -> None:
    tt.set_backend(name)
    assert tt.get_backend() == name


def test_use_backend_nests_and_restores() -> None:
    tt.set_backend("auto")
    with tt.use_backend("eager"):
        with tt.use_backend("triton"):
            assert tt.get_backend() == "triton"
            tt.set_backend("eager")
            assert tt.get_backend() == "triton", "the innermost block wins"
        assert tt.get_backend() == "eager"
        with pytest.raises(ZeroDivisionError), tt.use_backend("auto"):
            _ = 1 / 0
        assert tt.get_backend() == "eager"
    assert tt.get_backend() == "eager", "set_backend inside a block lasts"


@pytest.mark.parametrize("name", ["Triton", "cuda", "", None, 3])
def test_unknown_names(name: object) -> None:
    before = tt.get_backend()
    for call in (tt.set_backend, lambda name: tt.use_backend(name).__enter__()):
        with pytest.raises(ValueError, match="'auto', 'triton', 'eager'") as caught:
            call(name)  # type: ignore[arg-type]
        assert repr(name) in str(caught.value)
    assert tt.get_backend() == before


def test_use_backend_stays_in_its_thread() -> None:
    seen: list[str] = []
    with tt.use_backend("eager"):
        tt.set_backend("auto")
        thread = threading.Thread(target=lambda: seen.append(tt.get_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_set_backend_reaches_every_thread() -> None:
    tt.set_backend("eager")
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(tt.get_backend())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["eager"] * 4


def test_backward_on_another_thread() -> None:
    """The backend is that of the forward, whichever thread runs backward."""
    x = torch.rand(4, requires_grad=True)
    with tt.use_backend("eager"):
        loss = tt.threshold_mse_loss(x, torch.rand(4), 0.5)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("asked", "device", "chosen"),
    [("auto", "cpu", "eager"), ("auto", "meta", "eager"), ("eager", "cpu", "eager"), ("eager", "cuda", "eager")],
)
def test_choice(asked: str, device: str, chosen: str) -> None:
    with tt.use_backend(asked):
        name, reason = backend.choose(torch.device(device))
    assert name == chosen
    assert ("asked for" in reason) == (asked == "eager")
    assert asked == "eager" or device in reason


def test_inductor_compiles_formulas_and_leaves_the_rest() -> None:
    x = torch.randn(4)
    with tt.use_backend("inductor"):
        assert backend.choose(torch.device("cpu"), compiles=True) == ("inductor", "asked for")
        assert backend.way(x, compiles=True) == "inductor"
        assert backend.choose(torch.device("meta"), compiles=True)[0] == "eager"
        assert backend.way(x) == "eager"
        assert torch.equal(tt.hardshrink(x), torch.hardshrink(x))
    with tt.use_backend("auto"):
        assert backend.way(x, compiles=True) == "eager", "auto never compiles"


def test_auto_takes_triton_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cuda", "xpu"):
        for has, chosen in ((True, "triton"), (False, "eager")):
            monkeypatch.setattr(backend, "has_triton", lambda has=has: has)
            with tt.use_backend("auto"):
                assert backend.choose(torch.device(device))[0] == chosen


@pytest.mark.skipif(INTERPRETED, reason="under the interpreter Triton takes CPU tensors")
def test_triton_on_cpu_tensors_is_a_clear_error() -> None:
    x = torch.rand(3)
    with tt.use_backend("triton"):
        for call in (lambda: tt.hardshrink(x), lambda: tt.threshold_mse_loss(x, x, 0.5)):
            with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1") as caught:
                call()
            assert "cpu" in str(caught.value)
            assert "auto" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", backend.BACKENDS)
def test_environment(name: str) -> None:
    done = python("import triton_thresh as tt; print(tt.get_backend())", TRITON_THRESH_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.slow
def test_environment_misspelt() -> None:
    done = python("import triton_thresh", TRITON_THRESH_BACKEND="tritn")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: TRITON_THRESH_BACKEND")
    assert "'tritn'" in last
    assert "'auto', 'triton', 'eager'" in last


WITHOUT_TRITON = '''
import sys

class Blind:
    """A finder that does not see Triton."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
import torch
import triton_thresh as tt
'''


@pytest.mark.slow
def test_without_triton_everything_runs_eagerly() -> None:
    done = python(
        WITHOUT_TRITON
        + """
assert "triton" not in sys.modules
x = torch.linspace(-1, 1, 9, requires_grad=True)
tt.hardshrink(x).sum().backward()
tt.threshold(x, x.detach().mean())
tt.threshold_bce_with_logits_loss(x, torch.rand(9)).backward()
print(tt.nn.ProximityMSELoss(0.5)(x, x.detach()).item())
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0"


@pytest.mark.slow
def test_without_triton_asking_for_it_is_a_clear_error() -> None:
    for call in ("tt.hardshrink(torch.rand(3))", "tt.threshold_mse_loss(torch.rand(3), torch.rand(3), 0.5)"):
        done = python(WITHOUT_TRITON + f"tt.set_backend('triton')\n{call}")
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0
        assert last.startswith("RuntimeError")
        assert "Triton is not installed" in last
        assert "auto" in last


@pytest.mark.slow
def test_import_touches_neither_triton_nor_a_device() -> None:
    done = python(
        "import sys, torch, triton_thresh\n"
        "print('triton' in sys.modules, 'triton_thresh.kernels.gate' in sys.modules, torch.cuda.is_initialized())"
    )
    assert done.stdout.split() == ["False"] * 3, done.stderr
