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

BACKENDS = ("auto", "triton", "eager")
TRITON_DEVICES = frozenset({"cuda", "xpu"})


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_setting = [_checked(os.environ.get("TRITON_THRESH_BACKEND") or "auto", "TRITON_THRESH_BACKEND")]
_override: ContextVar[str | None] = ContextVar("triton_thresh_backend", default=None)


def set_backend(name: str) -> None:
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


def get_backend() -> str:
    """The backend asked for: that of the innermost `use_backend`, else of `set_backend`, else of TRITON_THRESH_BACKEND.

    Examples:
        >>> with use_backend("eager"):
        ...     get_backend()
        'eager'
    """
    return _override.get() or _setting[0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
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
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


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
