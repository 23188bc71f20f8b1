"""Which backend runs a call: the setting, the environment, and the rule of `auto`."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Parameter

from .checks import is_exporting

Backend = Literal["auto", "triton", "eager", "inductor"]
Way = Literal["triton", "eager", "inductor", "op", "formula"]

ASKED = "asked for"
BACKENDS = get_args(Backend)
TRITON_DEVICES = frozenset({"cuda", "xpu"})


@functools.cache
def has_triton() -> bool:
    """True if Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


# Devices on which a compiler may see ops, not formulas.
_INTERPRETED = frozenset({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else ())
OP_DEVICES = TRITON_DEVICES | _INTERPRETED if has_triton() else frozenset()
_TRACED = (Tensor, Parameter, FakeTensor, FunctionalTensor)


def _checked(name: str, origin: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return cast(Backend, name)


_setting = [_checked(os.environ.get("TRITON_THRESH_BACKEND") or "auto", "TRITON_THRESH_BACKEND")]
_override: ContextVar[Backend | None] = ContextVar("triton_thresh_backend", default=None)
# The same for Dynamo, which cannot trace a ContextVar. It traces anew when the list changes.
_traced_overrides: list[str] = []


def set_backend(name: Backend) -> None:
    """Choose the backend of every following call, in every thread.

    Args:
        name: "auto" (Triton for tensors on a GPU, save where a kernel of torch does the same sooner; else eager torch), "triton",
            "eager", or "inductor" (losses are compiled by torch.compile at their first call, which takes seconds; all else runs
            as under "auto").

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
        name: "auto", "triton", "eager" or "inductor", as for `set_backend`.

    Raises:
        ValueError: for another name.

    Examples:
        >>> import triton_thresh as tt
        >>> with use_backend("eager"):
        ...     tt.hardshrink(torch.tensor([0.2, 0.6]))
        tensor([0.0000, 0.6000])
    """
    token = _override.set(_checked(name, "use_backend: name"))
    _traced_overrides.append(name)
    try:
        yield
    finally:
        _traced_overrides.pop()
        _override.reset(token)


@functools.cache
def interpreting() -> bool:
    """True if Triton's kernels run in its interpreter, on CPU tensors."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _is_watched() -> bool:
    """True while a compiler, a tracer, a transform, a dispatch mode or forward-mode AD is at work."""
    return (
        is_dynamo_compiling()
        or _are_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
    )


def is_ordinary(*tensors: object) -> bool:
    """True if kernels may have these: ordinary tensors, and no compiler, tracer, transform or forward-mode AD at work.

    A tensor that torch has yet to negate (``z.conj().imag``) is not ordinary, because its memory does not hold its values.
    """
    if _is_watched():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            if is_legacy_batchedtensor(tensor) or tensor.is_neg():  # type: ignore[arg-type, attr-defined]
                return False
        elif kind is not float and isinstance(tensor, Tensor):
            return False
    return True


def is_one_op(input: Tensor, *others: object, everywhere: bool = False) -> bool:
    """True if a call that is not ordinary should appear as a single op of torch.library.

    Compilers and dispatch modes get the op on devices that Triton drives, because they would split the fused kernel. Plain
    torch goes to transforms, forward-mode AD and tensor subclasses, which differentiate or batch it; to `torch.jit.trace`; and
    to exporters, so that a program runs where this package is not installed (unless backend "triton" is asked for).

    `everywhere` says that the op is also for devices without Triton, where a compiler would make something larger of it.
    """
    if input.device.type not in OP_DEVICES and not (everywhere and is_compiling()):
        return False
    # Dynamo answers this form of the question without a node in its graph.
    transform = torch._C._functorch.peek_interpreter_stack()
    if isinstance(transform, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0:
        return False
    asked = _asked()
    if is_compiling():
        if is_exporting() and asked != "triton":
            return False
    elif _len_torch_dispatch_stack() == 0:
        return False
    if not everywhere and (asked == "eager" or (asked != "triton" and input.device.type not in TRITON_DEVICES)):
        return False
    return all(type(t) in _TRACED for t in (input, *others) if isinstance(t, Tensor))


def _asked() -> Backend:
    """The backend asked for, in a way that Dynamo can trace."""
    if is_compiling():
        return cast(Backend, _traced_overrides[-1]) if _traced_overrides else _setting[0]
    return get_backend()


def way(input: Tensor, *others: object, compiles: bool = False) -> Way:
    """How a call goes: to kernels, to torch's own eager ops, as one op of torch.library, or as a formula in plain torch.

    `compiles` says that the op is a formula which Inductor may compile, if that is asked for.
    """
    if is_ordinary(input, *others):
        if input.is_cpu and not compiles and (_override.get() or _setting[0]) != "triton":
            return "eager"  # as `choose` finds out in three times the time
        return choose(input.device, compiles)[0]
    if compiles and _asked() == "inductor":
        return "formula"
    return "op" if is_one_op(input, *others) else "formula"


def way_of_plain(input: Tensor) -> Way | None:
    """The way of one dense tensor that is ordinary, None for others. It asks little, because some calls take 2 µs."""
    kind = type(input)
    if (
        (kind is not Tensor and kind is not Parameter)
        or _is_watched()
        or input.layout is not torch.strided
        or is_legacy_batchedtensor(input)
        or input.is_neg()
    ):
        return None
    if input.is_cpu and (_override.get() or _setting[0]) != "triton":
        return "eager"
    return choose(input.device)[0]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@functools.cache
def is_driven(device: torch.device) -> bool:
    """True if Triton may drive such a device."""
    return device.type in TRITON_DEVICES


@functools.cache
def _automatic(device: torch.device, driven: bool, installed: bool) -> tuple[Way, str]:
    if driven and not installed:
        return "eager", "auto: Triton is not installed"
    if driven:
        return "triton", f"auto: tensors on {device.type} run on Triton"
    return "eager", f"auto: tensors on {device.type} run in eager torch"


def choose(device: torch.device, compiles: bool = False) -> tuple[Way, str]:
    """The backend for tensors on `device`, and why."""
    asked = _override.get() or _setting[0]
    if asked == "eager":
        return "eager", ASKED
    if asked == "inductor" and compiles and device.type != "meta":
        return "inductor", ASKED
    if asked in ("auto", "inductor"):
        return _automatic(device, is_driven(device), has_triton())
    if not has_triton():
        raise RuntimeError('backend "triton" was asked for, but Triton is not installed; install it or use "auto"')
    if not is_driven(device) and not (device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f'backend "triton" was asked for a tensor on {str(device)!r}: expected a tensor on a GPU, or TRITON_INTERPRET=1 '
            'in the environment before Triton is first imported (slow, for testing); "auto" runs CPU tensors in eager torch'
        )
    return "triton", ASKED


class Plan(NamedTuple):
    """A call as it would go."""

    way: Way
    reason: str
    block: int | None
    num_warps: int | None
    block_source: str | None
    forward_bytes: int | None
    backward_bytes: int | None
    saved_bytes: int | None


def planned(way: Way, device: torch.device, choice: Any, searches: bool, *moved: int) -> Plan:
    """A plan; `choice` is the block size and where it came from (None: no kernel runs)."""
    reason = choose(device, way == "inductor")[1]
    if way == "op":
        reason += "; traced as one op"
    elif way == "formula":
        reason = "compiled, transformed or subclassed tensors run in plain torch"
    if choice is None:
        return Plan(way, reason, None, None, None, *moved)
    (block, num_warps), source = choice
    if source == "default" and searches:
        source = "default; the first call searches"
    return Plan("triton", reason, block, num_warps, source, *moved)
