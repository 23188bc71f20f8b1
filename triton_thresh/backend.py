"""Which backend runs a call: the setting, the environment, and the rule of `auto`."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

BACKENDS = ("auto", "triton", "eager")
TRITON_DEVICES = frozenset({"cuda", "xpu"})


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


# Devices on which a compiler sees ops, not formulas: known at import, so that no graph depends on the backend set meanwhile.
_INTERPRETED = frozenset({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else ())
OP_DEVICES = TRITON_DEVICES | _INTERPRETED if has_triton() else frozenset()
_TRACED = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_setting = [_checked(os.environ.get("TRITON_THRESH_BACKEND") or "auto", "TRITON_THRESH_BACKEND")]
_override: ContextVar[str | None] = ContextVar("triton_thresh_backend", default=None)


def set_backend(name: str) -> None:
    """Choose the backend of every following call: "auto", "triton" or "eager"."""
    _setting[0] = _checked(name, "set_backend")


def get_backend() -> str:
    """The backend asked for: that of the innermost `use_backend`, else of `set_backend`, else of TRITON_THRESH_BACKEND."""
    return _override.get() or _setting[0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, in this thread."""
    token = _override.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def is_plain(*tensors: object) -> bool:
    """Whether these may be handed to a kernel: ordinary tensors, no compiler, tracer, transform or forward-mode AD at work."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (
            type(tensor) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_legacy_batchedtensor(tensor)
        ):
            return False
    return True


def is_traced(input: Tensor, *tensors: object) -> bool:
    """Whether a call that is not plain is to be an op of library.py: compilers, tracers and dispatch modes see it whole where
    kernels may run; transforms, forward-mode AD and other subclasses see through it.
    """
    if input.device.type not in OP_DEVICES:
        return False
    # asked in the way that Dynamo answers without a node in its graph
    transform = torch._C._functorch.peek_interpreter_stack()
    if isinstance(transform, torch._C._functorch.CInterpreter) or torch.autograd.forward_ad._current_level >= 0:
        return False
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return False
    return all(type(t) in _TRACED for t in (input, *tensors) if isinstance(t, Tensor))


def choose(device: torch.device) -> tuple[str, str]:
    """The backend for tensors on `device`, and why."""
    asked = get_backend()
    if asked == "eager":
        return "eager", "asked for"
    if asked == "triton":
        if not has_triton():
            raise RuntimeError('backend "triton" was asked for, but Triton is not installed; install it or use "auto"')
        if device.type not in TRITON_DEVICES and not (device.type == "cpu" and interpreting()):
            raise RuntimeError(
                f'backend "triton" was asked for a tensor on {str(device)!r}: expected a tensor on a GPU, or TRITON_INTERPRET=1 '
                'in the environment before Triton is first imported (slow, for testing); "auto" runs CPU tensors in eager torch'
            )
        return "triton", "asked for"
    if device.type not in TRITON_DEVICES:
        return "eager", f"auto: tensors on {device.type} run in eager torch"
    if not has_triton():
        return "eager", "auto: Triton is not installed"
    return "triton", f"auto: tensors on {device.type} run on Triton"
