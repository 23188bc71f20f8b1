"""Which backend runs a call: the setting, the environment, and the rule of `auto`."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.nn import Parameter

ASKED = "asked for"
Backend = Literal["auto", "triton", "eager"]
BACKENDS = get_args(Backend)
TRITON_DEVICES = frozenset({"cuda", "xpu"})


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


# Devices on which a compiler sees ops, not formulas: known at import, so that no graph depends on the backend set meanwhile.
_INTERPRETED = frozenset({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else ())
OP_DEVICES = TRITON_DEVICES | _INTERPRETED if has_triton() else frozenset()
_TRACED = (Tensor, Parameter, FakeTensor, FunctionalTensor)


def _checked(name: str, origin: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return cast(Backend, name)


_setting = [_checked(os.environ.get("TRITON_THRESH_BACKEND") or "auto", "TRITON_THRESH_BACKEND")]
_override: ContextVar[Backend | None] = ContextVar("triton_thresh_backend", default=None)


def set_backend(name: Backend) -> None:
    """Choose the backend of every following call, in every thread.

    Args:
        name: "auto" (Triton for tensors on a GPU, else eager torch), "triton" or "eager".

    Raises:
        ValueError: for another name. A call under "triton" raises RuntimeError for tensors that Triton cannot take.

    Equivalent to:
        the environment variable ``TRITON_THRESH_BACKEND=name``, read at import

    Examples:
        >>> set_backend("auto")
        >>> get_backend()
        'auto'
    """
    _setting[0] = _checked(name, "set_backend: name")


def get_backend() -> Backend:
    """The backend asked for: that of the innermost `use_backend`, else of `set_backend`, else of TRITON_THRESH_BACKEND.

    Examples:
        >>> with use_backend("eager"):
        ...     get_backend()
        'eager'
    """
    return _override.get() or _setting[0]


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, in this thread. A backward runs on the backend of its forward.

    Args:
        name: "auto", "triton" or "eager", as for `set_backend`.

    Raises:
        ValueError: for another name.

    Examples:
        >>> import triton_thresh as tt
        >>> with use_backend("eager"):
        ...     tt.hardshrink(torch.tensor([0.2, 0.6]))
        tensor([0.0000, 0.6000])
    """
    token = _override.set(_checked(name, "use_backend: name"))
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
    """Whether these may be handed to a kernel: ordinary tensors, no compiler, tracer, transform or forward-mode AD at work.

    A tensor that torch has yet to negate (``z.conj().imag``) is not one: its memory does not hold its values.
    """
    if is_dynamo_compiling():
        return False
    if _are_transforms_active() or forward_ad._current_level >= 0 or _len_torch_dispatch_stack() > 0 or _is_tracing():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            if is_legacy_batchedtensor(tensor) or tensor.is_neg():  # type: ignore[arg-type, attr-defined]
                return False
        elif kind is not float and isinstance(tensor, Tensor):
            return False
    return True


def _is_triton_around() -> bool:
    """Whether `use_backend("triton")` surrounds the call."""
    return _override.get() == "triton"


# what torch.compiler.assume_constant_result sets, without importing Dynamo, which reads no ContextVar
_is_triton_around._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced(input: Tensor, *tensors: object) -> bool:
    """Whether a call that is not plain is to be an op of library.py: compilers, tracers and dispatch modes see it whole where
    kernels may run; transforms, forward-mode AD and other subclasses see through it.

    So does torch.export, unless `use_backend("triton")` surrounds it: a program may be loaded where this package is not.
    """
    if input.device.type not in OP_DEVICES or (is_exporting() and not _is_triton_around()):
        return False
    # asked in the way that Dynamo answers without a node in its graph
    transform = torch._C._functorch.peek_interpreter_stack()
    if isinstance(transform, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0:
        return False
    if not is_compiling() and _len_torch_dispatch_stack() == 0:
        return False
    return all(type(t) in _TRACED for t in (input, *tensors) if isinstance(t, Tensor))


def runs_eagerly(input: Tensor) -> bool:
    """Whether a call on an ordinary tensor, not compiled, is one of torch's own CPU ops: the cheapest of these checks."""
    return (
        input.is_cpu
        and input.layout is torch.strided
        and (_override.get() or _setting[0]) != "triton"
        and not _are_transforms_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack() == 0
        and not _is_tracing()
        and not (input.requires_grad and is_legacy_batchedtensor(input))
    )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@functools.cache
def is_driven(device: torch.device) -> bool:
    """Whether Triton may drive such a device."""
    return device.type in TRITON_DEVICES


@functools.cache
def _automatic(device: torch.device, driven: bool, installed: bool) -> tuple[str, str]:
    if driven and not installed:
        return "eager", "auto: Triton is not installed"
    if driven:
        return "triton", f"auto: tensors on {device.type} run on Triton"
    return "eager", f"auto: tensors on {device.type} run in eager torch"


def choose(device: torch.device) -> tuple[str, str]:
    """The backend for tensors on `device`, and why."""
    asked = _override.get() or _setting[0]
    if asked == "eager":
        return "eager", ASKED
    if asked == "auto":
        return _automatic(device, is_driven(device), has_triton())
    if not has_triton():
        raise RuntimeError('backend "triton" was asked for, but Triton is not installed; install it or use "auto"')
    if not is_driven(device) and not (device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f'backend "triton" was asked for a tensor on {str(device)!r}: expected a tensor on a GPU, or TRITON_INTERPRET=1 '
            'in the environment before Triton is first imported (slow, for testing); "auto" runs CPU tensors in eager torch'
        )
    return "triton", ASKED
