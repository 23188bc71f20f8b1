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


ENVIRONMENT = """
import os, sys, torch
for name in ("auto", "triton", "eager", "inductor", "tritn"):
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ["TRITON_THRESH_BACKEND"] = name
        try:
            import triton_thresh as tt
            print(name, tt.get_backend())
        except ValueError as error:
            print(name, error)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_environment() -> None:
    """Read when the package is imported; a process for each name, which starts with torch imported."""
    done = python(ENVIRONMENT)
    *known, unknown = done.stdout.splitlines()
    assert set(known) == {f"{name} {name}" for name in backend.BACKENDS}, done.stderr
    assert unknown.startswith("tritn TRITON_THRESH_BACKEND")
    assert "'tritn'" in unknown
    assert "'auto', 'triton', 'eager'" in unknown


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
def test_without_triton() -> None:
    """Everything runs eagerly, the command line says why, and asking for Triton is a clear error."""
    done = python(
        WITHOUT_TRITON
        + """
from triton_thresh.__main__ import main
assert "triton" not in sys.modules
x = torch.linspace(-1, 1, 9, requires_grad=True)
tt.hardshrink(x).sum().backward()
tt.threshold(x, x.detach().mean())
tt.threshold_bce_with_logits_loss(x, torch.rand(9)).backward()
torch.ops.triton_thresh.threshold_mse_loss(tt.hardshrink(x), x.detach(), 0.5).backward()
print(tt.nn.ProximityMSELoss(0.5)(x, x.detach()).item())
main(["info"])
tt.set_backend("triton")
for call in (lambda: tt.hardshrink(torch.rand(3)), lambda: tt.threshold_mse_loss(torch.rand(3), torch.rand(3), 0.5)):
    try:
        call()
    except RuntimeError as error:
        print(str(error).splitlines()[-1])
"""
    )
    assert done.returncode == 0, done.stderr
    zero, *said = done.stdout.strip().splitlines()
    assert zero == "0.0"
    assert "triton is not installed: every op runs in eager torch" in "\n".join(said)
    assert "cpu: eager (auto: tensors on cpu run in eager torch)" in said
    for error in said[-2:]:
        assert "Triton is not installed" in error
        assert "auto" in error


@pytest.mark.slow
def test_import_is_light() -> None:
    """It touches no device and imports neither Triton nor Dynamo nor typer, of which it needs none."""
    done = python(
        "import sys, torch\n"
        "found = {name for name in ('triton', 'torch._dynamo', 'typer') if name in sys.modules}\n"
        "sys.modules['torch._dynamo'] = sys.modules['typer'] = None\n"
        "import triton_thresh as tt\n"
        "x = torch.linspace(-1, 1, 5, requires_grad=True)\n"
        "torch.ops.triton_thresh.threshold_mse_loss(tt.hardshrink(x), x.detach(), 0.5).backward()\n"
        "print(found, 'triton' in sys.modules, 'triton_thresh.kernels.gate' in sys.modules, torch.cuda.is_initialized())\n"
        "from triton_thresh.__main__ import main"
    )
    assert done.stdout.split() == ["set()", "False", "False", "False"], done.stderr
    assert (done.returncode, done.stderr) == (1, "The command line needs typer: pip install typer\n")
